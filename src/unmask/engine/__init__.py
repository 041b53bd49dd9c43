"""Continuous batching: requests with their own recipes and settings join and leave one batch at any step."""

from unmask.engine.ask import Ask, Cell, Done, Ticket, Update, ask
from unmask.engine.engine import Counts, Engine, Full

__all__ = ["Ask", "Cell", "Counts", "Done", "Engine", "Full", "Ticket", "Update", "ask"]
