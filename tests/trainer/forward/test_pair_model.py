"""PairModel: packed equals separate on each architecture, whatever the micro-batches, wrappers and dtype."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Llama4TextConfig,
    MambaConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from tests.support.trl_oracle import Pair, gradients, make_pairs, moved, single_rows, tiny_model, totals_of, worst
from trainer.config.loss_config import DpoLoss, LossConfig, SftLoss, SimpoLoss
from trainer.forward.architecture import VERIFIED_ARCHITECTURES, UnsupportedHead
from trainer.forward.chunked_logps import ChunkSize
from trainer.forward.packing import pack_pairs, pad_pairs
from trainer.forward.pair_model import CannotPack, PairModel
from trainer.objectives.losses import required_stats
from trainer.objectives.pair_logps import LossTerms, PairLogps, RequiredStats, metric_sums

SIMPO = SimpoLoss(beta=2.0, gamma=1.0, sft_weight=0.1)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied-heads": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "mistral-window": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "olmo2": {},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "sliding_window": 9, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 3.0},
    "gemma3_text": {"tie_word_embeddings": True, "sliding_window": 9},
}  # fmt: skip


def build(name: str) -> PreTrainedModel:
    return tiny_model(name.split("-", maxsplit=1)[0], **ARCHITECTURES[name])


def step(
    model: nn.Module, pairs: list[Pair], loss: LossConfig = SIMPO, reference: PairLogps | None = None, **options: Any
) -> tuple[LossTerms, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    terms = PairModel(model, **options).backward(pairs, loss, reference, totals_of(pairs), torch.Tensor.backward)
    return terms, gradients(model)


def test_every_verified_type_is_verified_here() -> None:
    assert {name.split("-", maxsplit=1)[0] for name in ARCHITECTURES} == VERIFIED_ARCHITECTURES


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_equals_separate(name: str) -> None:
    """Through transformers' own attention and masks on one side, ours on the other; values and all gradients."""
    model, pairs = build(name), make_pairs(5)
    shared, apart = PairModel(model, "packed"), PairModel(model, "separate")
    assert (shared.mode, apart.mode) == ("packed", "separate")
    one, other = (each.logps(pairs, RequiredStats(prompt=True)).columns() for each in (shared, apart))
    for column in one:
        torch.testing.assert_close(one[column], other[column], rtol=1e-5, atol=1e-4)
    terms, found = step(model, pairs, attention="packed")
    expected, right = step(model, pairs, attention="separate")
    assert float(terms.loss) == pytest.approx(float(expected.loss), rel=1e-5)
    assert worst(found, right) < 2e-5


@pytest.mark.parametrize("attention", ["packed", "separate"])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2"])
def test_one_response_alone_has_the_log_prob_that_it_has_in_its_pair(name: str, attention: Any) -> None:
    model, pairs = PairModel(build(name), attention), make_pairs(6)
    whole, alone = model.logps(pairs), model.logps(single_rows(pairs))
    for side in ("chosen", "rejected"):
        tokens, logps = (getattr(alone, f"{side}{end}") for end in ("_tokens", ""))
        assert tokens.tolist() == [len(getattr(row, side)) for row in single_rows(pairs)]
        torch.testing.assert_close(logps, getattr(whole, side) * (tokens > 0), rtol=1e-5, atol=1e-4)


def test_long_pairs_cross_blocks_and_are_computed_again_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs longer than a block of queries; probabilities kept, and made again because they are too many."""
    model, pairs = tiny_model(), make_pairs(3, scale=12)
    assert max(len(p.prompt) + len(p.chosen) for p in pairs) > 256
    _, right = step(model, pairs, attention="separate")
    _, stored = step(model, pairs, attention="packed")
    monkeypatch.setattr("trainer.forward.packed_attention.MAX_SAVED_BYTES", 0)
    _, again = step(model, pairs, attention="packed")
    assert worst(stored, right) < 2e-5
    assert worst(again, stored) < 1e-6


@pytest.mark.parametrize("attention", ["packed", "separate"])
@pytest.mark.parametrize("loss", [SIMPO, DpoLoss(), SftLoss()], ids=lambda loss: loss.kind)
def test_gradients_do_not_depend_on_micro_batches(attention: str, loss: LossConfig) -> None:
    model, pairs = tiny_model(), make_pairs(6)
    reference = PairModel(moved(model)).logps(pairs) if required_stats(loss).reference else None
    terms, right = step(model, pairs, loss, reference, attention=attention)
    pair_model = PairModel(model, attention)  # pyright: ignore[reportArgumentType]
    for cut in ([[0], [1], [2], [3], [4], [5]], [[4, 1], [0, 5, 3], [2]]):
        model.zero_grad()
        total = 0.0
        for index in cut:
            part = None if reference is None else reference.select(index)
            found = pair_model.backward([pairs[i] for i in index], loss, part, totals_of(pairs), torch.Tensor.backward)
            total += float(found.loss)
        assert total == pytest.approx(float(terms.loss), rel=1e-6)
        assert worst(gradients(model), right) < 1e-5


class NoFloat64(TorchDispatchMode):
    """A device that has no float64, as Apple's GPU: any result of that type is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64, func
        return result


@pytest.mark.parametrize("attention", ["packed", "separate"])
@pytest.mark.parametrize("loss", [SIMPO, DpoLoss(), SftLoss()], ids=lambda loss: loss.kind)
def test_an_update_needs_no_float64_where_the_device_has_none(
    attention: str, loss: LossConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pairs = tiny_model(), make_pairs(6)
    reference = PairModel(moved(model)).logps(pairs) if required_stats(loss).reference else None
    terms, right = step(model, pairs, loss, reference, attention=attention)
    sums = metric_sums(terms)
    for module in ("forward.chunked_logps", "objectives.pair_logps"):
        monkeypatch.setattr(f"trainer.{module}.sum_dtype", lambda _: torch.float32)
    pair_model = PairModel(model, attention)  # pyright: ignore[reportArgumentType]
    model.zero_grad(set_to_none=True)
    with NoFloat64():
        found = pair_model.backward(pairs, loss, reference, totals_of(pairs), torch.Tensor.backward)
        narrow = metric_sums(found)
        model_norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert bool(torch.isfinite(model_norm))
    assert worst(gradients(model), right) < 1e-5
    assert narrow == {name: pytest.approx(value, rel=1e-4, abs=1e-4) for name, value in sums.items()}


def test_chunks_of_the_output_layer_do_not_matter() -> None:
    model, pairs = tiny_model(), make_pairs(6)
    _, right = step(model, pairs)
    for rows in (ChunkSize(7, 7), ChunkSize(7, 64), ChunkSize(64, 64)):
        _, found = step(model, pairs, chunk_size=rows)
        assert worst(found, right) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    model, pairs = tiny_model(), make_pairs(4)
    _, right = step(model, pairs)
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    _, found = step(model, pairs)
    assert worst(found, right) < 1e-6
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_adapters_only(checkpointing: bool) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    if checkpointing:
        adapted.train()
        adapted.enable_input_require_grads()
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
    pairs = make_pairs(4)
    _, found = step(adapted, pairs, attention="packed")
    _, right = step(adapted, pairs, attention="separate")
    assert found
    assert all("lora" in name for name in found)
    assert worst(found, right) < 2e-5


def test_an_adapter_on_the_output_layer_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["lm_head", "q_proj"]))
    with pytest.raises(UnsupportedHead, match="leave it out of the adapters"):
        PairModel(adapted)


def test_tied_embeddings_get_both_gradients() -> None:
    model, pairs = build("llama-tied-heads"), make_pairs(3)
    _, found = step(model, pairs)
    untied = tiny_model(num_key_value_heads=4, tie_word_embeddings=False)
    untied.load_state_dict(model.state_dict() | {"lm_head.weight": model.get_input_embeddings().weight})
    _, apart = step(untied, pairs)
    expected = apart["model.embed_tokens.weight"] + apart["lm_head.weight"]
    torch.testing.assert_close(found["model.embed_tokens.weight"], expected)


def test_a_distributed_model_reduces_its_gradients(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model, pairs = tiny_model(), make_pairs(4)
    _, right = step(model, pairs)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        reduced: list[int] = []
        wrapped.register_comm_hook(None, lambda _, bucket: _record(reduced, bucket))
        for _ in range(2):
            _, found = step(wrapped, pairs)
        assert sum(reduced) == 2 * sum(p.numel() for p in model.parameters())
        assert worst({name.removeprefix("module."): g for name, g in found.items()}, right) < 1e-6
        assert "forward" not in vars(model)
    finally:
        dist.destroy_process_group()


def _record(reduced: list[int], bucket: Any) -> torch.futures.Future[torch.Tensor]:
    reduced.append(bucket.buffer().numel())
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def test_bfloat16_autocast_agrees_with_float32_to_its_precision() -> None:
    model, pairs = tiny_model(), make_pairs(6)
    exact, right = step(model, pairs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms, found = step(model, pairs)
        logps = PairModel(model).logps(pairs)
    assert logps.chosen.dtype == torch.float64
    torch.testing.assert_close(logps.chosen, exact.logps.chosen, rtol=0.02, atol=0.3)
    assert all(g.dtype == torch.float32 for g in found.values())
    assert float(terms.loss) == pytest.approx(float(exact.loss), rel=0.05)
    agreement = nn.functional.cosine_similarity(
        *(torch.cat([g.flatten() for g in each.values()]) for each in (found, right)), dim=0
    )
    assert agreement > 0.99


def test_counters_count_passes_and_positions() -> None:
    pairs = make_pairs(5)
    shared, apart = PairModel(tiny_model(), "packed"), PairModel(tiny_model(), "separate")
    for each in (shared, apart):
        each.logps(pairs)
        each.backward(pairs, SIMPO, None, totals_of(pairs), torch.Tensor.backward)
    assert (shared.counters.forwards, apart.counters.forwards) == (2, 2)
    assert shared.counters.tokens == 2 * pack_pairs(pairs).tokens
    assert apart.counters.tokens == 2 * pad_pairs(pairs).tokens > shared.counters.tokens


def test_sft_computes_no_rejected_responses() -> None:
    model, pairs = tiny_model(), make_pairs(4)
    trained = PairModel(model)
    terms = trained.backward(pairs, SftLoss(), None, totals_of(pairs), torch.Tensor.backward)
    assert trained.counters.tokens == sum(len(p.prompt) + len(p.chosen) - 1 for p in pairs)
    full = trained.logps(pairs)
    torch.testing.assert_close(terms.logps.chosen, full.chosen)
    assert float(terms.loss) == pytest.approx(float(-full.chosen.sum() / full.chosen_tokens.sum()), rel=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    """Its own attention for whoever uses it next, generation for instance."""
    model, pairs = tiny_model(), make_pairs(2)
    before = model(torch.arange(1, 9)[None]).logits
    PairModel(model).logps(pairs)
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(torch.arange(1, 9)[None]).logits, before)


def test_reference_must_be_there_and_of_these_pairs() -> None:
    model, pairs = PairModel(tiny_model()), make_pairs(3)
    totals = totals_of(pairs)
    with pytest.raises(ValueError, match="needs reference"):
        model.backward(pairs, DpoLoss(), None, totals, torch.Tensor.backward)
    with pytest.raises(ValueError, match="takes no reference"):
        model.backward(pairs, SIMPO, model.logps(pairs), totals, torch.Tensor.backward)
    with pytest.raises(ValueError, match="other pairs"):
        model.backward(pairs, DpoLoss(), model.logps(make_pairs(3, seed=5)), totals, torch.Tensor.backward)


def small(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


LLAMA4 = {"intermediate_size": 32, "intermediate_size_mlp": 32, "num_local_experts": 2, "attention_chunk_size": 8}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
MAMBA = {"num_hidden_layers": 1, "state_size": 4}
UNABLE = {
    "alibi": (lambda: small(BloomConfig(vocab_size=256, hidden_size=32, n_layer=1, n_head=2)), "interface|ALiBi"),
    "chunked": (
        lambda: small(Llama4TextConfig(vocab_size=256, hidden_size=32, **HEADS, **LLAMA4)),
        "chunked_attention",
    ),
    "recurrent": (lambda: small(MambaConfig(vocab_size=256, hidden_size=32, **MAMBA)), "layers of type"),
}


@pytest.mark.parametrize("name", UNABLE)
def test_architectures_that_cannot_share_say_why_and_still_train(name: str, caplog: Any) -> None:
    maker, reason = UNABLE[name]
    model, pairs = maker(), make_pairs(3)
    with caplog.at_level(logging.WARNING):
        trained = PairModel(model)
    assert trained.mode == "separate"
    assert trained.separate_reason is not None
    assert any(part in trained.separate_reason for part in reason.split("|"))
    with caplog.at_level(logging.WARNING):
        PairModel(model)
    assert sum("separate padded sequences" in record.message for record in caplog.records) == 1
    terms = trained.backward(pairs, SIMPO, None, totals_of(pairs), torch.Tensor.backward)
    assert torch.isfinite(terms.loss)
    for number, pair in enumerate(pairs):
        alone = trained.logps([pair])
        torch.testing.assert_close(terms.logps.select([number]).chosen, alone.chosen, rtol=1e-5, atol=1e-5)
    with pytest.raises(CannotPack, match="cannot share prompts"):
        PairModel(model, "packed")


def test_a_type_that_no_test_covers_is_compared_when_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.config.model_type = "unheard_of"
    assert PairModel(model).mode == "packed"
    monkeypatch.setattr(
        "trainer.forward.architecture._scored_hidden_states", lambda core, batch: torch.randn(len(batch.rows), 4)
    )
    assert "differ by" in str(PairModel(model).separate_reason)
    model.config.sliding_window = 4096
    assert "not verified" in str(PairModel(model).separate_reason)


def test_an_unknown_output_layer_is_refused() -> None:
    model = tiny_model()
    model.config.model_type = "unheard_of"
    plain = type(model).forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        out = plain(model, *args, **kwargs)
        out.logits = out.logits * 2
        return out

    model.forward = doubled
    with pytest.raises(UnsupportedHead, match="more than a linear output layer"):
        PairModel(model)


def test_a_mixture_of_experts_is_told_what_is_left_out(caplog: Any) -> None:
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, intermediate_size=16,
    )  # fmt: skip
    model = small(config)
    with caplog.at_level(logging.WARNING):
        shared = PairModel(model)
    assert shared.mode == "packed"
    assert "load-balancing" in caplog.text
    pairs = make_pairs(3)
    torch.testing.assert_close(shared.logps(pairs).chosen, PairModel(model, "separate").logps(pairs).chosen)


def test_dropout_in_attention_is_an_error_in_the_packed_form() -> None:
    model = tiny_model(attention_dropout=0.5)
    model.train()
    with pytest.raises(ValueError, match="attention_dropout"):
        step(model, make_pairs(2), attention="packed")
