"""What published figures that bear on the questions do and do not say, each in our words."""

from __future__ import annotations

NOTES: tuple[tuple[str, str], ...] = (
    (
        "97% (GSM8K) and 99% (MMLU) of answers are right at half of the steps (Prophet)",
        "So with random remasking, or on MMLU with a suffix that announces the answer. With low-confidence remasking "
        "and no suffix the shares are 24% and 21%. Only samples whose last answer is right are counted.",
    ),
    (
        "Up to 3.4 times faster (Prophet)",
        "Sudoku on a canvas of 24 tokens, with Dream. On GSM8K the gain is 1.6 to 1.7.",
    ),
    (
        "Savings multiply rather than overlap",
        "Prophet on top of Fast-dLLM was measured at 69% of the product of both alone: each saves steps that the other "
        "would have saved.",
    ),
    (
        "34 times faster (FreeCache with a guide)",
        "The largest value of the first version; the mean told later is 12.1.",
    ),
    (
        "+2.1% accuracy and +42% throughput from a searched architecture",
        "Two different models: the one is Panda, the other is Surefire.",
    ),
    (
        "Compute at test time replaces a larger model, above all on difficult questions (Snell et al.)",
        "The other way round: it does on easy and medium questions, and on the hardest ones the larger model wins.",
    ),
    (
        "67% shorter reasoning at 2.73 times the speed (ASC)",
        "67% is the best of its cases, and the 2.73 is of another one.",
    ),
    ("DCoLT gains 9% to 19%", "The gains told are +5.7 to +19.5 points, by task."),
    (
        "Faster than autoregressive decoding (D2F)",
        "Its autoregressive baseline was not optimised. Over a fast one the claim has to be measured again.",
    ),
    (
        "133 and 276 times faster (ICE)",
        "Over a weak baseline: vanilla decoding with the whole canvas as one block, whose accuracy is far below what "
        "the same model has in blocks. The largest gains are hundreds of steps for a one-letter answer.",
    ),
    (
        "Lookahead data teach planning (TRELAWNEY)",
        "Contested: reviewers found random goals to do better than chosen ones, and that one setting gives away a part "
        "of the solution.",
    ),
    (
        "Diffusion-LM controls text better",
        "It is slow. Its advantage in control was never shown together with speed; that is the open question above.",
    ),
)
"""(the claim as it is cited, what to know about it)."""
