"""Requests through a real engine with room for all: answers, options, books, prefix cache."""

from collections.abc import Iterator

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBatch

from lab.scenarios import needle_pins
from tests.e2e.conftest import FOUR_GROUPS, assert_idle, opened
from tests.inside import managers
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.tasks.needle import is_right
from vllm_kvcompress.lengths.budgets import compaction_lengths

pytestmark = pytest.mark.engine

POLICIES = ["windowkv", "snapkv", "keydiff", "streaming_llm", "random"]
OTHERS = ["adakv", "cake", "chunkkv", "criticalkv", "expected_attention", "h2o", "knorm", "lagkv"]
OTHERS += ["pyramidkv", "spindlekv-evict", "streaming_llm_rerotated", "tova"]
OTHERS += ["windowkv_llama3"]


@pytest.fixture(scope="module")
def engine(probe_model: str, stock_tokens) -> Iterator[Engine]:
    """Four layer groups, room for everything. Depends on `stock_tokens`: one engine at a time."""
    with opened(probe_model, FOUR_GROUPS) as engine:
        yield engine


@pytest.fixture(autouse=True)
def leaves_nothing_behind(engine: Engine) -> Iterator[None]:
    yield
    assert_idle(engine)


def right_answers(engine: Engine, samples, outputs) -> int:
    return sum(is_right(engine.decode(t), s.answer) for s, t in zip(samples, outputs, strict=True))


@pytest.mark.parametrize(
    "xargs",
    [{"kv_compression": "none"}, {"kv_budget_ratio": 1.0}, {"kv_budget_tokens": 5000}],
    ids=["none", "ratio 1.0", "budget above the prompt"],
)
def test_nothing_evicted_changes_no_token(engine, prompts, stock_tokens, xargs) -> None:
    compressed = dict(engine.scheduler.stats.requests)
    assert engine.generate(prompts, 16, xargs, ignore_eos=True) == stock_tokens
    assert engine.scheduler.stats.requests == compressed


def test_windowkv_answers_from_an_eighth_of_the_cache(engine, samples, prompts) -> None:
    outputs = engine.generate(prompts, 8)
    assert right_answers(engine, samples, outputs) >= 8
    assert engine.scheduler.stats.requests["windowkv"] >= len(prompts)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_pinned_sentence_survives_every_policy(engine, samples, prompts, policy) -> None:
    assert pinned_answers(engine, samples, prompts, policy) >= 9


@pytest.mark.parametrize("policy", OTHERS)
def test_the_pinned_sentence_survives_the_other_policies(engine, samples, prompts, policy) -> None:
    assert pinned_answers(engine, samples[1::3], prompts[1::3], policy) == 3


def pinned_answers(engine: Engine, samples, prompts, policy: str) -> int:
    xargs = [
        {"kv_compression": policy, "kv_pin": needle_pins(engine, sample)} for sample in samples
    ]
    return right_answers(engine, samples, engine.generate(prompts, 8, xargs))


def test_streaming_llm_is_wrong_where_the_number_is_not_kept(engine, samples, prompts) -> None:
    outputs = engine.generate(prompts, 8, {"kv_compression": "streaming_llm"})
    config = parse_config("streaming_llm")
    for sample, prompt, tokens in zip(samples, prompts, outputs, strict=True):
        start, end = needle_pins(engine, sample)
        (lengths,) = compaction_lengths(len(prompt), config, 1, 32)
        first_kept = lengths.region_len - lengths.kept_len + config.num_sink_tokens
        if end <= first_kept and start >= config.num_sink_tokens:
            assert not is_right(engine.decode(tokens), sample.answer), f"depth {sample.depth}"
        elif start >= first_kept:
            assert is_right(engine.decode(tokens), sample.answer), f"depth {sample.depth}"


def test_blocks_held_and_freed_are_exactly_the_planned_ones(engine, prompts) -> None:
    prompt = [7 + token % 1000 for token in prompts[0]]  # not in the prefix cache
    stats = engine.scheduler.stats
    taken, returned = stats.blocks_taken.get("keydiff", 0), stats.blocks_returned.get("keydiff", 0)
    engine.add("r", prompt, 60, {"kv_compression": "keydiff", "kv_budget_tokens": 300})
    config = parse_config({"preset": "keydiff", "budget": {"tokens": 300}})
    lengths = compaction_lengths(len(prompt), config, 4, 32)
    committed = False
    while engine.engine.has_unfinished_requests():
        engine.step()
        engine.scheduler.check_integrity()
        (request,) = engine.scheduler.requests.values() or [None]
        if request is None or request.num_output_tokens < 2:
            continue
        committed = True
        for manager, each in zip(managers(engine), lengths, strict=True):
            physical = request.num_computed_tokens - each.evicted
            blocks = manager.req_to_blocks[request.request_id]
            assert manager.evicted[request.request_id] == each.evicted
            assert len(blocks) == -(-physical // 32)
            assert len({block.block_id for block in blocks}) == len(blocks)
    assert committed
    saved = sum(each.evicted // 32 for each in lengths)
    taken = stats.blocks_taken["keydiff"] - taken
    assert taken == sum(each.kept_len // 32 for each in lengths)
    assert stats.blocks_returned["keydiff"] - returned - taken == saved
    assert (lengths[0].region_len - lengths[0].kept_len) // 32 * 4 == saved


def test_worker_and_scheduler_agree_on_rows_and_lengths(engine, prompts) -> None:
    for index, prompt in enumerate(prompts[:3]):
        engine.add(f"r{index}", prompt, 30, {"kv_compression": POLICIES[index]}, ignore_eos=True)
    while engine.engine.has_unfinished_requests():
        engine.step()
        state, tables = engine.runner.model_state.lengths, engine.runner.block_tables
        for request_id, row in engine.runner.req_states.req_id_to_index.items():
            if request_id not in engine.scheduler.requests or (
                engine.scheduler.compactions.is_planned(request_id)
            ):
                continue
            for group, manager in enumerate(managers(engine)):
                blocks = [block.block_id for block in manager.req_to_blocks[request_id]]
                assert tables.num_blocks.np[group, row] == len(blocks)
                assert tables.block_tables[group].gpu[row, : len(blocks)].tolist() == blocks
                assert state.evicted.np[group, row] == manager.evicted.get(request_id, 0)


def test_mixed_batches_do_not_disturb_each_other(engine, prompts, stock_tokens) -> None:
    """Requests of every kind at once give what each gives alone.

    No two share a block: a compaction that others' blocks are in the way of waits for these.
    """
    kinds = [{"kv_compression": p} for p in [*POLICIES, "none"]]
    kinds.append({"kv_budget_ratio": 0.5})
    asked = [[40 + number, *prompts[0][1:]] for number in range(len(kinds))]
    asked[5] = prompts[0]
    alone = [
        engine.generate([prompt], 16, kind, ignore_eos=True)[0]
        for prompt, kind in zip(asked, kinds, strict=True)
    ]
    assert engine.generate(asked, 16, kinds, ignore_eos=True) == alone
    assert alone[5] == stock_tokens[0]
    short = prompts[1][:100]
    outputs = engine.generate([asked[0], short, asked[2]], 16, kinds[:3], ignore_eos=True)
    assert outputs[0] == alone[0] and outputs[2] == alone[2]


def test_short_prompts_are_left_alone_and_counted(engine, prompts) -> None:
    before = engine.scheduler.stats.uncompressed.get("short_prompt", 0)
    engine.generate([prompts[0][:511], prompts[0][:3]], 4)
    assert engine.scheduler.stats.uncompressed["short_prompt"] == before + 2


@pytest.mark.parametrize("policy", ["snapkv", "keydiff"])
def test_a_repeated_prompt_hits_the_prefix_cache(engine, prompts, policy) -> None:
    prompt = prompts[2][:1200]
    engine.add(f"{policy}-1", prompt, 8, {"kv_compression": policy})
    engine.drain()
    engine.add(f"{policy}-2", prompt, 8, {"kv_compression": policy})
    engine.add(f"{policy}-3", prompt, 8, {"kv_compression": "none"})
    engine.drain()
    first, second, third = (engine.results[f"{policy}-{i}"] for i in (1, 2, 3))
    assert second.token_ids == first.token_ids
    # snapkv computes its 16 window tokens again: their queries are not in any cache.
    assert second.num_cached_tokens == (1200 - 16 if policy == "snapkv" else 1199) // 32 * 32
    assert third.num_cached_tokens == 1199 // 32 * 32


def test_compacted_blocks_are_never_found_in_the_prefix_cache(engine, prompts) -> None:
    """A prompt that continues a compressed one must see the whole of it, not the survivors."""
    prompt = [3 + token % 4000 for token in prompts[3]]
    first = engine.generate([prompt], 64, {"kv_compression": "random"}, ignore_eos=True)[0]
    continued = prompt + first
    engine.add("cold", continued[1:], 8, {"kv_compression": "none"})  # another text: no hit
    engine.add("warm", continued, 8, {"kv_compression": "none"})
    engine.drain()
    assert engine.results["warm"].num_cached_tokens <= len(prompt)
    assert engine.scheduler.reset_prefix_cache()
    engine.add("fresh", continued, 8, {"kv_compression": "none"})
    engine.drain()
    assert engine.results["fresh"].num_cached_tokens == 0
    assert engine.results["warm"].token_ids == engine.results["fresh"].token_ids


@pytest.mark.parametrize("stage", ["prefill", "between plan and commit", "decode"])
def test_aborts_return_every_block(engine, prompts, stage) -> None:
    engine.add("victim", prompts[4], 50, ignore_eos=True)
    engine.add("witness", prompts[5], 12, ignore_eos=True)
    alone = None
    for _ in range(200):
        engine.step()
        engine.scheduler.check_integrity()
        victim = engine.live().get("victim")
        if victim is None:
            break
        reached = {
            "prefill": 0 < victim.num_computed_tokens < victim.num_prompt_tokens,
            "between plan and commit": engine.scheduler.compactions.is_planned(victim.request_id),
            "decode": victim.num_output_tokens > 3,
        }[stage]
        if reached:
            engine.abort("victim")
            alone = stage
            break
    assert alone == stage, "the stage was never seen"
    engine.drain()
    engine.step()
    witness = engine.results["witness"].token_ids
    assert engine.generate([prompts[5]], 12, ignore_eos=True) == [witness]


def test_resetting_the_prefix_cache_preempts_and_recovers(engine, prompts) -> None:
    expected = engine.generate([prompts[6]], 30, ignore_eos=True)[0]
    engine.add("r", prompts[6], 30, ignore_eos=True)
    while len(engine.results["r"].token_ids) < 10:
        engine.step()
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.drain()
    assert engine.results["r"].token_ids == expected
    assert engine.num_preemptions >= 1


def attention_addresses(engine, **kwargs) -> dict[str, int]:
    """Where each layer's attention would read its lengths, for a dummy batch of two rows."""
    runner = engine.runner
    batch = InputBatch.make_dummy(2, 2, runner.input_buffers)
    tables, slots = runner.prepare_dummy_attn(batch)
    metadata = runner.model_state.prepare_attn(
        batch,
        CUDAGraphMode.FULL,
        tables,
        slots,
        runner.attn_groups,
        runner.kv_cache_config,
        **kwargs,
    )
    return {name: each.seq_lens.data_ptr() for name, each in metadata.items()}


def test_captured_graphs_and_real_batches_read_lengths_at_one_address(
    engine, prompts, monkeypatch
) -> None:
    """A full CUDA graph replays the addresses it captured: a stale length would go unnoticed."""
    captured = attention_addresses(engine, for_capture=True)
    assert len(set(captured.values())) == 4, "every layer group has lengths of its own"
    state, seen = engine.runner.model_state, []
    original = state.prepare_attn

    def spy(*args, **kwargs):
        metadata = original(*args, **kwargs)
        seen.append({name: each.seq_lens.data_ptr() for name, each in metadata.items()})
        lengths = {name: each.seq_lens.tolist() for name, each in metadata.items()}
        seen[-1]["lengths"] = list(lengths.values())
        return metadata

    monkeypatch.setattr(state, "prepare_attn", spy)
    engine.generate([prompts[0]], 6, {"kv_budget_tokens": 320}, ignore_eos=True)
    for addresses in seen:
        lengths = addresses.pop("lengths")
        assert addresses == captured
    # The last step: logical length less what was evicted, in every group.
    config = parse_config({**FOUR_GROUPS, "budget": {"tokens": 320}})
    planned = compaction_lengths(len(prompts[0]), config, 4, 32)
    total = len(prompts[0]) + 5
    assert lengths == [[total - each.evicted] for each in planned]
    assert attention_addresses(engine) == captured, "dummy runs too"


def test_lost_queries_are_counted_and_no_silent_no_op(
    engine, prompts, stock_tokens, monkeypatch
) -> None:
    """The fault is injected where the worker looks queries up; the scheduler's books survive."""
    failures = dict(engine.scheduler.stats.failures)
    monkeypatch.setattr(
        engine.runner.model_state.window,
        "take",
        lambda *_: (_ for _ in ()).throw(RuntimeError("lost queries")),
    )
    assert engine.generate(prompts[7:8], 16, ignore_eos=True) == stock_tokens[7:8]
    assert engine.scheduler.stats.failures["error"] == failures.get("error", 0) + 1


def test_the_parts_around_a_layer_are_the_models(engine, probe_model) -> None:
    """Read back from what vLLM packed for the CPU, against the file the model came in."""
    from safetensors.torch import load_file

    weights = load_file(f"{probe_model}/model.safetensors")
    for layer in engine.runner.compactor.layers:
        weight = weights[f"model.layers.{layer.index}.self_attn.o_proj.weight"].float()
        found = layer.output_projection()  # [heads, hidden, head_dim]
        torch.testing.assert_close(found.transpose(0, 1).flatten(1), weight, rtol=1e-5, atol=1e-6)
        size = 2 * layer.rotary.inv_freq.shape[0]
        theta = engine.runner.model_config.hf_text_config.rope_parameters["rope_theta"]
        expected = theta ** (-torch.arange(0, size, 2) / size)
        torch.testing.assert_close(layer.rotary.inv_freq, expected)
        assert layer.rotary.is_neox


def test_a_requests_task_is_decided_once_and_counted(engine, samples, prompts) -> None:
    """Both tasks in one batch; the decision reaches the worker, and leaves no trace."""
    before = dict(engine.scheduler.stats.tasks)
    xargs = [None, {"kv_task": "aggregation"}, {"kv_task": "localization"}]
    seen = {}
    for number, extra in enumerate(xargs):
        engine.add(f"t{number}", prompts[1], 8, extra)
    while engine.engine.has_unfinished_requests():
        engine.step()
        for request_id, config in engine.runner.model_state.request_configs.items():
            seen[request_id.rsplit("-", 1)[0]] = config.task
            tracked = engine.scheduler.planner.requests.get(request_id)
            assert tracked is None or tracked.task == config.task, "None: just finished"
    assert seen == {"t0": "localization", "t1": "aggregation", "t2": "localization"}
    after = engine.scheduler.stats.tasks
    for key in ("localization/classifier", "aggregation/request", "localization/request"):
        assert after[key] == before.get(key, 0) + 1
    assert engine.results["t0"].token_ids == engine.results["t2"].token_ids
    assert is_right(engine.decode(engine.results["t0"].token_ids), samples[1].answer)


def test_a_summary_is_asked_for_in_another_tone(engine, prompts) -> None:
    """The same context under another instruction is the other task."""
    instruction = "Write a one-page summary of the following report.\n\n"
    prompt = engine.tokenize(instruction) + prompts[0][20:900] + engine.tokenize("\n\nSummary:")[1:]
    before = engine.scheduler.stats.tasks.get("aggregation/classifier", 0)
    engine.generate([prompt], 2)
    assert engine.scheduler.stats.tasks["aggregation/classifier"] == before + 1


@torch.inference_mode()
def test_the_cache_holds_the_selected_rows(engine, prompts, monkeypatch) -> None:
    """Bit for bit: destination rows are the source rows the policy selected."""
    compactor = engine.runner.compactor
    select, choose_and_copy = compactor._select, compactor._choose_and_copy
    selected, copies = [], []

    def selecting(*args):
        selected.append(select(*args))
        return selected[-1]

    def spy(policy, group, number, *args):
        choose_and_copy(policy, group, number, *args)
        layers, indices = compactor._layers_of(number), selected[-1]
        for layer, chosen in zip(layers, indices[:, 0], strict=True):
            read, cache = layer.layout.read, layer.cache()
            sources, found = read(cache, group.blocks(0)), read(cache, group.destination(0))
            for rows, source in zip(found, sources, strict=True):
                for head in range(rows.shape[0]):
                    assert torch.equal(rows[head], source[head, chosen[head]])
            copies.append(layer.name)

    monkeypatch.setattr(compactor, "_select", selecting)
    monkeypatch.setattr(compactor, "_choose_and_copy", spy)
    engine.generate([prompts[8]], 2, {"kv_compression": "snapkv"})
    assert len(copies) == 4
