"""Pure tensor algebra of decoding: canvas, rules, the loop. It imports no model."""

from unmask.decode.account import Account, Tally, account
from unmask.decode.algebra import Pick, Rows, Rule, Where
from unmask.decode.belief import Belief
from unmask.decode.blocks import Blocks
from unmask.decode.canvas import Canvas, cat
from unmask.decode.draft import Cost, Draft
from unmask.decode.early import Clear, Cosine, Exponential, Level, Linear, Prefer, Staged, Sure, gap, prefer
from unmask.decode.expression import parse
from unmask.decode.judge import agrees
from unmask.decode.ledger import Ledger, Report, useful
from unmask.decode.loop import Denoiser, Step, decode, step
from unmask.decode.pick import best, confident, drawn, dream_quota, entropy_bounded, factor, leftmost, scattered
from unmask.decode.probe import Pinned, Probing
from unmask.decode.recipe import Mixed, Recipe
from unmask.decode.revise import calm, doubted
from unmask.decode.serial import cached, closed, held, leads, pace, storing
from unmask.decode.where import (
    Budget,
    Decided,
    Every,
    Region,
    abandoned,
    answer,
    dirty,
    ended,
    everything,
    filled,
    finished,
    first_step,
    frontier,
    masked,
    phase,
    prefix,
    response,
    thinking,
)

__all__ = [
    "Account",
    "Belief",
    "Blocks",
    "Budget",
    "Canvas",
    "Clear",
    "Cosine",
    "Cost",
    "Decided",
    "Denoiser",
    "Draft",
    "Every",
    "Exponential",
    "Ledger",
    "Level",
    "Linear",
    "Mixed",
    "Pick",
    "Pinned",
    "Prefer",
    "Probing",
    "Recipe",
    "Region",
    "Report",
    "Rows",
    "Rule",
    "Staged",
    "Step",
    "Sure",
    "Tally",
    "Where",
    "abandoned",
    "account",
    "agrees",
    "answer",
    "best",
    "cached",
    "calm",
    "cat",
    "closed",
    "confident",
    "decode",
    "dirty",
    "doubted",
    "drawn",
    "dream_quota",
    "ended",
    "entropy_bounded",
    "everything",
    "factor",
    "filled",
    "finished",
    "first_step",
    "frontier",
    "gap",
    "held",
    "leads",
    "leftmost",
    "masked",
    "pace",
    "parse",
    "phase",
    "prefer",
    "prefix",
    "response",
    "scattered",
    "step",
    "storing",
    "thinking",
    "useful",
]
