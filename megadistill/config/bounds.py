"""Upper bounds of the numbers in a recipe, far above what any run needs.

A number behind its bound is a typing mistake. Without one it would end in a traceback, in a run that never ends, or in
gigabytes of memory, long after the recipe was read.
"""

from typing import Annotated, Final

from pydantic import Field

MAX_STEPS: Final = 10**9
"""Steps, and intervals in steps, which may say `never`: long runs have a few million."""
MAX_TOKENS: Final = 10**18
"""Tokens: the largest data sets have 10^14; sums stay within 64 bits."""
MAX_SEQUENCES: Final = 10**7
"""Sequences of a step: the largest batches have 10^5."""
MAX_SEQUENCE: Final = 1 << 24
"""Tokens of a sequence, as in a manifest: the longest have 10^7."""
MAX_ROPE_THETA: Final = 1e15
"""Base of rotary embeddings, as in a model's config."""
MAX_RANKS: Final = 10**6
"""Ranks: the largest clusters have 10^5 GPUs."""
MAX_BATCHES: Final = 1000
"""Batches that are kept in memory."""
MAX_SEED: Final = 2**63 - 1
"""A signed integer of 64 bits, which may be a time in nanoseconds."""
MAX_MINUTES: Final = 10**7
"""Nineteen years."""
MAX_SECONDS: Final = 10**9
"""Thirty years, which a thread can still wait."""
MAX_MEGABYTES: Final = 10**6
"""A terabyte, on one rank."""
MAX_WEIGHT: Final = 10**6
"""Weight of a term of the loss; float32 holds its product with the loss and with the square of log Z."""
MAX_SHARE: Final = 10**18
"""Share of a source, which may be its number of tokens."""
MIN_TEMPERATURE: Final = 1e-3
MAX_TEMPERATURE: Final = 10**4
"""Logits of 1000 stay finite divided by the least, and bfloat16 still tells logits apart divided by the largest."""
MAX_RATE: Final = 10**6
"""Learning rate, weight decay, norm of gradients."""
MIN_EPSILON: Final = 1e-30
"""Smallest number that is added to a root: float32 would round less than 1e-38 to 0."""
MAX_ZSCORE: Final = 10**9
"""Robust standard deviations: a threshold that nothing exceeds."""
MAX_KL: Final = 1000
"""Nats a token: a bound that no teacher exceeds."""
MAX_WINDOW: Final = 10**5
"""Steps whose losses are kept for a median."""
MAX_IDS: Final = 10**6
"""Ids of a token's sparse target, or draws for it: a vocabulary has a few hundred thousand."""
MAX_MULTIPLE: Final = 10**6
"""Rows to a multiple of which a vocabulary is padded."""

Step = Annotated[int, Field(ge=0, le=MAX_STEPS)]
"""A step's number, from 1; the section says so for 0."""
SequenceNumber = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
"""A number of a sequence in the stream."""
Share = Annotated[float, Field(ge=0, le=MAX_SHARE)]
"""A source's share; `CurriculumEntry` refuses 0, by the source's name."""
