"""The exercises of notebook 09, real engines: what to load, what to call the model with, what to save."""

from __future__ import annotations

from kvlab.course.exercises.engine import Exercise, Wrong
from kvlab.course.minikv import blocks_to_save, next_inputs, trusted_blocks, usable_tokens

T, F = True, False


# --- usable_tokens ------------------------------------------------------------------------------
def _usable_counts_all(present: list[bool], prompt_tokens: int, block_tokens: int) -> int:
    return min(sum(present), (prompt_tokens - 1) // block_tokens) * block_tokens


def _usable_whole_prompt(present: list[bool], prompt_tokens: int, block_tokens: int) -> int:
    return [*present, False].index(False) * block_tokens


def _usable_one_token_less(present: list[bool], prompt_tokens: int, block_tokens: int) -> int:
    return min([*present, False].index(False) * block_tokens, prompt_tokens - 1)


def _usable_blocks(present: list[bool], prompt_tokens: int, block_tokens: int) -> int:
    return usable_tokens(present, prompt_tokens, block_tokens) // block_tokens


def _usable_never_the_last(present: list[bool], prompt_tokens: int, block_tokens: int) -> int:
    return max(0, min([*present, False].index(False), prompt_tokens // block_tokens - 1)) * block_tokens


USABLE_TOKENS = Exercise(
    name="usable_tokens",
    number="09.1",
    difficulty=2,
    reference=usable_tokens,
    cases=(
        ([T, T, F], 200, 64),
        ([T, F, T, T], 300, 64),
        ([T, T], 130, 64),
        ([T, T], 128, 64),
        ([], 40, 64),
        ([F, T], 200, 64),
        ([T] * 5, 96, 16),
        ([T], 65, 64),
        ([T, T], 129, 64),
    ),
    wrong=(
        Wrong(_usable_counts_all, "a block behind a gap is of no use: count from the first block to the first gap"),
        Wrong(_usable_whole_prompt, "one token must be left to compute: without it there are no logits"),
        Wrong(
            _usable_one_token_less,
            "whole blocks only: this engine cannot load 63 tokens of a block, so the last block is computed whole",
        ),
        Wrong(_usable_blocks, "return tokens, not blocks"),
        Wrong(
            _usable_never_the_last,
            "the last whole block may be loaded if tokens follow it: 130 tokens are two blocks of 64 and two more",
        ),
    ),
    hint="blocks from the first one to the first gap, at most (prompt_tokens - 1) // block_tokens, times block_tokens",
    after="vLLM calls this get_num_new_matched_tokens; it asks again and again while a request waits for room.",
)


# --- next_inputs: a hunt ------------------------------------------------------------------------
def first_next_inputs(tokens: list[int], cached: int) -> dict[str, list[int]]:
    """The inputs of a call whose cache has the KV of the first tokens."""
    rest = tokens[cached:]
    positions = list(range(len(rest)))
    return {"ids": rest, "positions": positions, "mask": [1] * len(rest)}


def _inputs_short_mask(tokens: list[int], cached: int) -> dict[str, list[int]]:
    right = next_inputs(tokens, cached)
    return {**right, "mask": [1] * len(right["ids"])}


def _inputs_restart(tokens: list[int], cached: int) -> dict[str, list[int]]:
    right = next_inputs(tokens, cached)
    return {**right, "positions": list(range(len(right["ids"])))}


def _inputs_empty(tokens: list[int], cached: int) -> dict[str, list[int]]:
    return {
        "ids": tokens[cached:],
        "positions": list(range(cached, len(tokens))),
        "mask": [1] * len(tokens),
    }


def _inputs_grown_mask(tokens: list[int], cached: int) -> dict[str, list[int]]:
    right = next_inputs(tokens, cached)
    return {**right, "mask": [1] * (cached + len(right["ids"]))}


def _inputs_only_mask(tokens: list[int], cached: int) -> dict[str, list[int]]:
    return {**first_next_inputs(tokens, cached), "mask": [1] * len(tokens)}


def _inputs_only_positions(tokens: list[int], cached: int) -> dict[str, list[int]]:
    return {**first_next_inputs(tokens, cached), "positions": list(range(cached, len(tokens)))}


def _inputs_always_one_more(tokens: list[int], cached: int) -> dict[str, list[int]]:
    start = max(0, cached - 1)
    return {"ids": tokens[start:], "positions": list(range(start, len(tokens))), "mask": [1] * len(tokens)}


NEXT_INPUTS = Exercise(
    name="next_inputs",
    number="09.2",
    difficulty=3,
    reference=next_inputs,
    given=first_next_inputs,
    cases=(
        ([11, 12, 13, 14, 15], 3),
        ([11, 12, 13, 14], 0),
        ([11, 12, 13, 14], 4),
        ([11, 12, 13], 1),
        ([11], 1),
    ),
    wrong=(
        Wrong(
            _inputs_short_mask, "the mask is over all tokens that the model may look at, those in the cache included"
        ),
        Wrong(_inputs_restart, "positions go on where the cache ends: the keys in it were rotated for theirs"),
        Wrong(
            _inputs_empty, "with everything in the cache there is no input and there are no logits: feed the last token"
        ),
        Wrong(_inputs_only_mask, "the mask is right; do the positions go on where the cache ends?"),
        Wrong(_inputs_only_positions, "the positions are right; the mask is over the cached tokens too"),
        Wrong(_inputs_grown_mask, "the caller takes the last token out of a full cache: the mask has len(tokens) ones"),
        Wrong(_inputs_always_one_more, "step back one token only if the cache has all of them"),
    ),
    hint="ids and positions from min(cached, len(tokens) - 1) on; the mask has a 1 for each token of the prompt",
    after="transformers works positions out by itself from the length of its cache, if it gets the whole mask.",
)


# --- blocks_to_save -----------------------------------------------------------------------------
def _save_partial(computed: int, scheduled: int, saved: int, present: list[bool], block_tokens: int) -> list[int]:
    whole = -(-(computed + scheduled) // block_tokens)
    return [i for i in range(saved, whole) if i >= len(present) or not present[i]]


def _save_this_step_only(
    computed: int, scheduled: int, saved: int, present: list[bool], block_tokens: int
) -> list[int]:
    whole = (computed + scheduled) // block_tokens
    return [i for i in range(computed // block_tokens, whole) if i >= len(present) or not present[i]]


def _save_again(computed: int, scheduled: int, saved: int, present: list[bool], block_tokens: int) -> list[int]:
    return blocks_to_save(computed, scheduled, 0, present, block_tokens)


def _save_present(computed: int, scheduled: int, saved: int, present: list[bool], block_tokens: int) -> list[int]:
    return blocks_to_save(computed, scheduled, saved, [], block_tokens)


def _save_known_only(computed: int, scheduled: int, saved: int, present: list[bool], block_tokens: int) -> list[int]:
    whole = (computed + scheduled) // block_tokens
    return [i for i in range(saved, min(whole, len(present))) if not present[i]]


def _save_scheduled(computed: int, scheduled: int, saved: int, present: list[bool], block_tokens: int) -> list[int]:
    return blocks_to_save(0, scheduled, saved, present, block_tokens)


BLOCKS_TO_SAVE = Exercise(
    name="blocks_to_save",
    number="09.3",
    difficulty=3,
    reference=blocks_to_save,
    cases=(
        (0, 100, 0, [F, F, F], 32),
        (96, 64, 3, [F, F, F, F, F], 32),
        (64, 64, 0, [T, T, F, F], 32),
        (64, 64, 0, [F, T, F, F], 32),
        (127, 1, 3, [F, F, F], 32),
        (128, 1, 4, [F, F, F], 32),
        (0, 31, 0, [], 32),
        (160, 32, 5, [F, F, F, F, F, T, F], 32),
    ),
    wrong=(
        Wrong(_save_partial, "only whole blocks have a key: a block that is half full is saved by a later step"),
        Wrong(
            _save_this_step_only,
            "the device may have had blocks that the store lost: they are whole too, and without them no later block "
            "is reached. Begin at `saved`",
        ),
        Wrong(_save_again, "blocks before `saved` were saved by an earlier step"),
        Wrong(_save_present, "what the store has need not be sent again"),
        Wrong(_save_known_only, "the answer grows beyond the blocks that were looked up: those are new in any case"),
        Wrong(_save_scheduled, "the step begins after `computed` tokens: its blocks end at computed + scheduled"),
    ),
    hint="range(saved, (computed + scheduled) // block_tokens), without those that `present` says are stored",
    after="kvlab's connector has this rule in `SchedulerSide.work`, for all requests of a step.",
)


# --- trusted_blocks: a hunt ---------------------------------------------------------------------
def first_trusted_blocks(filled: list[int], failed: list[int]) -> list[int]:
    """The blocks of a step that may be saved if some loads of it failed."""
    return [i for i in filled if i not in failed]


def _trust_nothing(filled: list[int], failed: list[int]) -> list[int]:
    return [] if failed else filled


def _trust_up_to_the_last(filled: list[int], failed: list[int]) -> list[int]:
    return [i for i in filled if not failed or i < max(failed)]


def _trust_fails_without(filled: list[int], failed: list[int]) -> list[int]:
    return [i for i in filled if i < min(failed)] if failed else []


def _trust_the_first_failed(filled: list[int], failed: list[int]) -> list[int]:
    return [i for i in filled if not failed or i <= min(failed)]


TRUSTED_BLOCKS = Exercise(
    name="trusted_blocks",
    number="09.4",
    difficulty=3,
    reference=trusted_blocks,
    given=first_trusted_blocks,
    cases=(
        ([6, 7, 8], [2]),
        ([6, 7], []),
        ([0, 1, 5, 6], [3]),
        ([0, 1, 2, 6], [4, 2]),
        ([4], [4]),
    ),
    wrong=(
        Wrong(_trust_nothing, "blocks before the first failed one were computed from intact ones: they are right"),
        Wrong(_trust_up_to_the_last, "the first failed block decides, not the last"),
        Wrong(_trust_fails_without, "if nothing failed, everything may be saved"),
        Wrong(_trust_the_first_failed, "the failed block itself was not loaded: what is in its place is not its KV"),
    ),
    hint="the KV of a block depends on all blocks before it: save only those before the first failed one",
    after="kvlab's connector needs no such rule: a request waits until its blocks are verified, and is computed then.",
)
