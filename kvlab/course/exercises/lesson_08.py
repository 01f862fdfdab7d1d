"""The exercises of notebook 08, serving: what a step computes, who joins, which worker, and what goes on elsewhere."""

from __future__ import annotations

from kvlab.course.exercises.engine import Exercise, Wrong
from kvlab.course.minikv import admit, choose_worker, fill_step, resume


# --- fill_step ----------------------------------------------------------------------------------
def _fill_prompts_first(decoding: list[str], prefilling: dict[str, int], budget: int) -> dict[str, int]:
    step = {}
    for name, remaining in prefilling.items():
        if (chunk := min(remaining, budget)) > 0:
            step[name] = chunk
            budget -= chunk
    return step | dict.fromkeys(decoding[: max(budget, 0)], 1)


def _fill_whole_prompts(decoding: list[str], prefilling: dict[str, int], budget: int) -> dict[str, int]:
    step = dict.fromkeys(decoding, 1)
    for name, remaining in prefilling.items():
        if remaining <= budget - sum(step.values()):
            step[name] = remaining
    return step


def _fill_equal_shares(decoding: list[str], prefilling: dict[str, int], budget: int) -> dict[str, int]:
    step = dict.fromkeys(decoding, 1)
    share = (budget - len(decoding)) // max(1, len(prefilling))
    return step | {name: min(remaining, share) for name, remaining in prefilling.items() if share > 0}


def _fill_zeros(decoding: list[str], prefilling: dict[str, int], budget: int) -> dict[str, int]:
    right = fill_step(decoding, prefilling, budget)
    return right | {name: 0 for name in prefilling if name not in right}


def _fill_budget_for_each(decoding: list[str], prefilling: dict[str, int], budget: int) -> dict[str, int]:
    left = budget - len(decoding)
    return dict.fromkeys(decoding, 1) | {name: min(remaining, left) for name, remaining in prefilling.items() if left}


def _fill_shortest_first(decoding: list[str], prefilling: dict[str, int], budget: int) -> dict[str, int]:
    return fill_step(decoding, dict(sorted(prefilling.items(), key=lambda item: item[1])), budget)


def _fill_only_the_first(decoding: list[str], prefilling: dict[str, int], budget: int) -> dict[str, int]:
    return fill_step(decoding, dict(list(prefilling.items())[:1]), budget)


def _fill_answers_are_free(decoding: list[str], prefilling: dict[str, int], budget: int) -> dict[str, int]:
    return dict.fromkeys(decoding, 1) | fill_step([], prefilling, budget)


FILL_STEP = Exercise(
    name="fill_step",
    number="08.1",
    difficulty=3,
    reference=fill_step,
    cases=(
        (["a", "b"], {"c": 100}, 64),
        (["a"], {"c": 10, "d": 100}, 64),
        ([], {"c": 100, "d": 30}, 64),
        (["a", "b", "c"], {}, 64),
        (["a", "b"], {"c": 5}, 2),
        ([], {"c": 20, "d": 20, "e": 40}, 64),
        (["a"], {"c": 90, "d": 10}, 64),
        ([], {}, 64),
    ),
    wrong=(
        Wrong(_fill_prompts_first, "answers first: whoever reads one waits for its next token"),
        Wrong(_fill_whole_prompts, "a prompt that does not fit whole is cut: a part of it runs now"),
        Wrong(_fill_equal_shares, "in order: the first prompt takes what it needs, the next one what remains"),
        Wrong(_fill_zeros, "a request with no token in this step is not in the result"),
        Wrong(_fill_budget_for_each, "the budget is for all together: take off what each request takes"),
        Wrong(_fill_shortest_first, "in the order of arrival, not the shortest first: a long one would starve"),
        Wrong(_fill_only_the_first, "what the first prompt leaves of the budget goes to the next one"),
        Wrong(_fill_answers_are_free, "the tokens of answers count too: take them off the budget"),
    ),
    hint="1 for each name in `decoding`; then for each prompt min(remaining, what is left of the budget), if above 0",
    after="vLLM's scheduler has this rule in `schedule()`, with `max_num_batched_tokens` as the budget.",
)


# --- admit: a hunt ------------------------------------------------------------------------------
def first_admit(waiting: list[int], free_pages: int, page_tokens: int) -> int:
    """How many of the waiting requests get pages now, given the tokens of each."""
    count = 0
    for tokens in waiting:
        pages = tokens // page_tokens
        if pages <= free_pages:
            free_pages -= pages
            count += 1
    return count


def _admit_only_rounding(waiting: list[int], free_pages: int, page_tokens: int) -> int:
    count = 0
    for tokens in waiting:
        pages = -(-tokens // page_tokens)
        if pages <= free_pages:
            free_pages -= pages
            count += 1
    return count


def _admit_one_more_and_passing(waiting: list[int], free_pages: int, page_tokens: int) -> int:
    count = 0
    for tokens in waiting:
        pages = tokens // page_tokens + 1
        if pages <= free_pages:
            free_pages -= pages
            count += 1
    return count


def _admit_only_order(waiting: list[int], free_pages: int, page_tokens: int) -> int:
    count = 0
    for tokens in waiting:
        free_pages -= tokens // page_tokens
        if free_pages < 0:
            break
        count += 1
    return count


def _admit_one_page_more(waiting: list[int], free_pages: int, page_tokens: int) -> int:
    count = 0
    for tokens in waiting:
        free_pages -= tokens // page_tokens + 1
        if free_pages < 0:
            break
        count += 1
    return count


def _admit_all_tokens(waiting: list[int], free_pages: int, page_tokens: int) -> int:
    count, room = 0, free_pages * page_tokens
    for tokens in waiting:
        room -= tokens
        if room < 0:
            break
        count += 1
    return count


def _admit_never_the_last(waiting: list[int], free_pages: int, page_tokens: int) -> int:
    count = 0
    for tokens in waiting:
        free_pages -= -(-tokens // page_tokens)
        if free_pages <= 0:
            break
        count += 1
    return count


ADMIT = Exercise(
    name="admit",
    number="08.2",
    difficulty=3,
    reference=admit,
    given=first_admit,
    cases=(
        ([100, 40], 20, 16),
        ([100, 40], 8, 16),
        ([300, 40, 20], 10, 16),
        ([32, 32], 4, 16),
        ([33, 16], 3, 16),
        ([20, 20, 20], 4, 16),
        ([], 4, 16),
        ([17], 1, 16),
    ),
    wrong=(
        Wrong(_admit_only_rounding, "who comes first is served first: if later ones pass, a long one starves"),
        Wrong(_admit_only_order, "a page that is partly used is used: 17 tokens need two pages of 16"),
        Wrong(_admit_one_page_more, "32 tokens need two pages of 16, not three"),
        Wrong(
            _admit_one_more_and_passing, "two things: 32 tokens need two pages of 16, and nobody may pass another one"
        ),
        Wrong(_admit_all_tokens, "requests do not share a page: round up for each of them"),
        Wrong(_admit_never_the_last, "the last free page may be used too"),
    ),
    hint="subtract each request's pages, rounded up, in order; stop at the first that does not fit",
    after="kvlab's scheduler asks for the prompt's pages only. If the pool is full, the youngest request waits again.",
)


# --- choose_worker ------------------------------------------------------------------------------
def _choose_longest(blocks: int, matched: list[int], work: list[float], weight: float) -> int:
    return matched.index(max(matched))


def _choose_least_work(blocks: int, matched: list[int], work: list[float], weight: float) -> int:
    return work.index(min(work))


def _choose_unweighted(blocks: int, matched: list[int], work: list[float], weight: float) -> int:
    return choose_worker(blocks, matched, work, 1.0)


def _choose_most(blocks: int, matched: list[int], work: list[float], weight: float) -> int:
    costs = [blocks - found + weight * done for found, done in zip(matched, work, strict=True)]
    return costs.index(max(costs))


def _choose_rewards_work(blocks: int, matched: list[int], work: list[float], weight: float) -> int:
    costs = [blocks - found - weight * done for found, done in zip(matched, work, strict=True)]
    return costs.index(min(costs))


def _choose_shares(blocks: int, matched: list[int], work: list[float], weight: float) -> int:
    costs = [(1 - weight) * (blocks - found) + weight * done for found, done in zip(matched, work, strict=True)]
    return costs.index(min(costs))


def _choose_with_this_one(blocks: int, matched: list[int], work: list[float], weight: float) -> int:
    costs = [blocks - found + weight * (done + blocks - found) for found, done in zip(matched, work, strict=True)]
    return costs.index(min(costs))


def _choose_weight_on_blocks(blocks: int, matched: list[int], work: list[float], weight: float) -> int:
    costs = [weight * (blocks - found) + done for found, done in zip(matched, work, strict=True)]
    return costs.index(min(costs))


def _choose_cost(blocks: int, matched: list[int], work: list[float], weight: float) -> float:
    return min(blocks - found + weight * done for found, done in zip(matched, work, strict=True))


CHOOSE_WORKER = Exercise(
    name="choose_worker",
    number="08.3",
    difficulty=2,
    reference=choose_worker,
    cases=(
        (10, [8, 0], [5.0, 4.5], 0.1),
        (10, [8, 0], [5.0, 5.0], 0.1),
        (10, [9, 0], [5.0, 0.0], 0.1),
        (10, [8, 0], [100.0, 0.0], 0.1),
        (10, [0, 0, 0], [7.0, 3.0, 9.0], 0.1),
        (10, [4, 6], [0.0, 10.0], 0.1),
        (10, [4, 4], [2.0, 2.0], 0.1),
        (6, [6, 3, 0], [50.0, 10.0, 0.0], 0.1),
        (6, [1, 6], [0.0, 60.0], 0.0),
        (10, [4, 0], [5.0, 0.0], 0.6),
        (10, [4, 0], [5.0, 0.0], 0.9),
    ),
    wrong=(
        Wrong(_choose_longest, "the longest prefix may be where the most work is: add weight * work"),
        Wrong(_choose_least_work, "what a worker has saves work: count the blocks that it would have to compute"),
        Wrong(_choose_unweighted, "the work is multiplied by `weight`"),
        Wrong(_choose_most, "the least cost wins"),
        Wrong(_choose_rewards_work, "work is a cost: add it"),
        Wrong(_choose_weight_on_blocks, "the weight belongs to the work, not to the blocks"),
        Wrong(_choose_shares, "blocks count whole, whatever the weight of the work"),
        Wrong(_choose_with_this_one, "the work so far does not include this request"),
        Wrong(_choose_cost, "return the worker's number, not its cost"),
    ),
    hint="cost of worker i: blocks - matched[i] + weight * work[i]; return the place of the least, the first of equals",
    after="NVIDIA's Dynamo routes by such a sum too; llm-d adds up weighted scores. Both have a weight to choose.",
)


# --- resume: a hunt -----------------------------------------------------------------------------
def first_resume(
    prompt: list[int],
    given: list[int],
    limit: int,
    eos: int,
) -> tuple[list[int], int] | None:
    """What to ask another worker for, if the first one died after `given`."""
    if given and given[-1] == eos:
        return None
    return prompt + given, limit


def _resume_from_scratch(prompt: list[int], given: list[int], limit: int, eos: int) -> tuple[list[int], int] | None:
    return None if len(given) == limit or eos in given else (prompt, limit)


def _resume_never_done(prompt: list[int], given: list[int], limit: int, eos: int) -> tuple[list[int], int] | None:
    return None if eos in given else (prompt + given, limit - len(given))


def _resume_no_eos(prompt: list[int], given: list[int], limit: int, eos: int) -> tuple[list[int], int] | None:
    return None if len(given) == limit else (prompt + given, limit - len(given))


def _resume_prompt_only(prompt: list[int], given: list[int], limit: int, eos: int) -> tuple[list[int], int] | None:
    return None if len(given) == limit or eos in given else (prompt, limit - len(given))


def _resume_last_again(prompt: list[int], given: list[int], limit: int, eos: int) -> tuple[list[int], int] | None:
    return None if len(given) == limit or eos in given else (prompt + given[:-1], limit - len(given[:-1]))


def _resume_eos_in_prompt(prompt: list[int], given: list[int], limit: int, eos: int) -> tuple[list[int], int] | None:
    return None if len(given) == limit or eos in prompt + given else (prompt + given, limit - len(given))


def _resume_too_long(prompt: list[int], given: list[int], limit: int, eos: int) -> tuple[list[int], int] | None:
    return None if len(given) == limit or eos in given else (prompt + given, limit)


RESUME = Exercise(
    name="resume",
    number="08.4",
    difficulty=2,
    reference=resume,
    given=first_resume,
    cases=(
        ([5, 6, 7], [21, 22], 8, 0),
        ([5, 6, 7], [], 8, 0),
        ([5, 6, 7], [21, 22, 23], 3, 0),
        ([5, 6, 7], [21, 0], 8, 0),
        ([5, 0, 7], [21], 2, 0),
    ),
    wrong=(
        Wrong(_resume_from_scratch, "the caller has the tokens of `given` already, and would get them twice"),
        Wrong(_resume_never_done, "with `limit` tokens the answer is whole, even if its end was not reported"),
        Wrong(_resume_no_eos, "after the end-of-text token nothing follows: the answer is whole"),
        Wrong(_resume_prompt_only, "the rest follows on what was given out: that belongs to the new prompt"),
        Wrong(_resume_last_again, "the caller has the last token too"),
        Wrong(_resume_eos_in_prompt, "an end-of-text token in the prompt does not end the answer"),
        Wrong(_resume_too_long, "the tokens that were given out count: limit - len(given) remain"),
    ),
    hint="None if the answer is whole; else (prompt + given, limit - len(given))",
    after="It works because decoding is greedy. With sampling, the other worker needs the state of the random numbers.",
)
