"""The speed lab measures what it says; how fast anything is, is not tested."""
import csv
import sys
from types import SimpleNamespace

import pytest
import torch

import tjepa
import train
from labs import arms, records, speed

# what the lab relies on of nanoGPT's model.py
STAND_IN = '''
import torch
class GPTConfig:
    def __init__(self, block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias):
        self.vocab_size, self.n_embd = vocab_size, n_embd
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.head = torch.nn.Linear(config.n_embd, config.vocab_size)
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas)
    def forward(self, idx, targets):
        logits = self.head(self.embed(idx)).flatten(0, 1)
        return logits, torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-1)
    def generate(self, idx, n):
        return idx
'''


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    """Rows and printed lines of the whole lab with --fast, beside a stand-in for nanoGPT."""
    out = tmp_path_factory.mktemp("speed")
    (out / "model.py").write_text(STAND_IN)
    before = records.read_rows(records.file_of("speed", speed.Flags()))
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **how: printed.append(words[0]))
        speed.speed(speed.Flags(fast=True, out=str(out), nanogpt=str(out)))
    assert records.read_rows(records.file_of("speed", speed.Flags())) == before
    with open(out / "speed-fast.csv") as file:
        return list(csv.DictReader(file)), printed


@pytest.fixture
def lab(tmp_path):
    """A lab that has read no corpus: its clock and its rows."""
    lab = object.__new__(speed.Lab)
    lab.flags = speed.Flags(fast=True, out=str(tmp_path))
    lab.device, lab.dtype, lab.limits = "cpu", None, {}
    lab.figures = lambda: {
        (row["arm"], row["figure"]): row["value"]
        for row in records.read_rows(tmp_path / "speed-fast.csv")}
    return lab


def gpt(depth=2, size=8):
    """A GPT of our blocks, width 32."""
    torch.manual_seed(0)
    return speed.gpt_of(32, depth, size)


def words(rows, length):
    """Random tokens (rows, length)."""
    torch.manual_seed(1)
    return torch.randint(2000, (rows, length))


def any_word():
    """A stand-in for a corpus: every token begins a word."""
    return SimpleNamespace(tokenizer=SimpleNamespace(word_start=[True] * speed.CFG.vocab_size))


# -- the control -----------------------------------------------------------------------------------

def test_the_control_is_causal():
    model, tokens = gpt(), words(2, 8)
    logits, _ = model(tokens, tokens)
    for place in range(8):
        changed = tokens.clone()
        changed[:, place] += 1
        moved = (model(changed, tokens)[0] - logits).abs().amax(-1)     # (B, T)
        assert (moved[:, :place] < 1e-6).all()
        assert (moved[:, place] > 1e-6).all()


@pytest.mark.parametrize("depth", (1, 3))
def test_the_control_has_the_parameters_that_its_docstring_states(depth):
    V, C = speed.CFG.vocab_size, 32
    n = sum(p.numel() for p in gpt(depth).parameters())
    assert n == V * C + depth * (12 * C * C + 2 * C) + C


def test_the_control_says_with_its_cache_what_it_says_without():
    model, said = gpt(), words(3, 4)
    for _ in range(4):
        said = torch.cat((said, model(said)[0].argmax(-1)), dim=1)
    assert torch.equal(model.generate(words(3, 4), 4), said[:, 4:])


def test_the_controls_loss_is_that_of_the_next_token_and_skips_padding():
    model, tokens, targets = gpt(), words(2, 8), words(2, 8)
    targets[:, 5:] = -1
    logits, loss = model(tokens, targets)
    own = targets.clamp(min=0)[..., None]
    each = -torch.log_softmax(logits, -1).gather(2, own)[..., 0]        # (B, T)
    assert torch.allclose(loss, each[:, :5].mean())


# -- counting FLOPs --------------------------------------------------------------------------------

def block_flops(tokens, keys, width):
    """Forward: 12 C^2 multiply-adds a token, and q k^T and its product with v over all keys."""
    return 2 * tokens * (12 * width ** 2 + 2 * keys * width)


def test_flops_of_the_control_are_those_counted_by_hand():
    B, T, C, V, depth = 3, 8, 32, speed.CFG.vocab_size, 2
    model, tokens = gpt(depth, T), words(B, T)
    forward = depth * block_flops(B * T, T, C) + 2 * B * T * C * V
    with torch.no_grad():
        assert speed.count_flops(lambda: model(tokens, tokens)) == forward
    # with the gradients of weights and of activations
    assert speed.count_flops(lambda: model(tokens, tokens)[1].backward()) == 3 * forward


def test_flops_of_the_encoder_are_those_counted_by_hand():
    cfg = tjepa.Config(**speed.shape(64), block_size=16)
    model = tjepa.TJEPA(cfg, torch.ones(cfg.vocab_size, dtype=torch.bool))
    with torch.no_grad():
        flops = speed.count_flops(lambda: model.encode(words(2, 16)))
    assert flops == cfg.n_layer * block_flops(2 * 16, 16, 64)


@pytest.mark.parametrize("width", (32, 96))
def test_flops_of_the_bare_products_are_those_of_a_block_without_attention(lab, width):
    lab.size = SimpleNamespace(rows=2)
    tokens = 2 * speed.CFG.block_size
    assert speed.count_flops(speed.products(lab, width)) == block_flops(tokens, 0, width)


def test_attention_is_counted_as_a_full_square_whatever_hides_half_of_it():
    q = torch.randn(2, 4, 8, 16)                                        # (B, nh, T, hs)
    mask = torch.ones(2, 1, 1, 8, dtype=torch.bool)
    for how in dict(), dict(is_causal=True), dict(attn_mask=mask):
        attend = torch.nn.functional.scaled_dot_product_attention
        assert speed.count_flops(lambda: attend(q, q, q, **how)) == 2 * (2 * 2 * 4 * 8 * 8 * 16)


@pytest.mark.parametrize("width, share", ((128, 1.13), (256, 1.24), (512, 1.31)))
def test_phase_1_costs_the_share_of_a_gpts_flops_that_the_docstring_states(width, share):
    # without SIGReg, which costs the same for any number of rows
    cfg = tjepa.Config(**speed.shape(width), sigreg=0)
    model = tjepa.TJEPA(cfg, torch.ones(cfg.vocab_size, dtype=torch.bool))
    tokens = words(1, 65)
    spans = tjepa.sample_spans(tokens[:, 1:], model.word_start, cfg)
    ours = speed.count_flops(lambda: model.pretrain_loss(tokens[:, 1:], spans)[0].backward())
    control = speed.gpt_of(width)
    theirs = speed.count_flops(lambda: control(tokens[:, :-1], tokens[:, 1:])[1].backward())
    assert ours / theirs < share + 0.01     # more would be a slower phase 1


# -- counting launches -----------------------------------------------------------------------------

def test_views_and_empty_tensors_launch_nothing():
    x = torch.randn(2, 6)

    def act():
        """Views of x, its sizes, and memory that nothing is written to."""
        x.view(3, 4).t().unsqueeze(0).expand(5, 4, 3).detach()
        x.chunk(2, dim=-1)
        assert x.size(0) == 2
        torch.empty_like(x)
    assert speed.count_launches(act) == 0


def test_each_operation_launches_one_kernel_forward_and_backward():
    x = torch.randn(2, 6, requires_grad=True)
    assert speed.count_launches(lambda: x.exp() + 1) == 2
    assert speed.count_launches(lambda: x.transpose(0, 1).contiguous()) == 1    # a copy
    # exp and sum; the gradient of the sum (ones, which are expanded) times exp
    assert speed.count_launches(lambda: x.exp().sum().backward()) == 4


def test_a_fused_operation_counts_once_for_all_its_tensors():
    tensors = [torch.randn(3) for _ in range(5)]
    assert speed.count_launches(lambda: torch._foreach_mul_(tensors, 2.0)) == 1


def test_one_launch_moves_all_weights_of_the_target():
    model = tjepa.TJEPA(tjepa.Config(n_embd=32, pred_embd=32), torch.ones(2048))
    before = model.target_encoder.embed.weight.clone()
    with torch.no_grad():
        model.context_encoder.embed.weight.add_(1)
    assert speed.count_launches(model.ema_update) == 1
    assert not torch.equal(model.target_encoder.embed.weight, before)


@pytest.mark.skipif(bool(train.no_graphs()), reason=train.no_graphs())
def test_a_graph_launches_what_it_cannot_fuse():
    """A chain of pointwise operations is one kernel, a matrix product one more."""
    x, weight = torch.randn(64, 64), torch.randn(64, 64)
    graph = train.as_graph(lambda: (torch.sin(x).exp() * 2) @ weight)
    assert speed.compiled_launches(graph) == 2


def test_a_deeper_model_launches_more_and_a_longer_text_does_not():
    with torch.no_grad():
        counts = [speed.count_launches(lambda: gpt(depth)(words(2, length)))
                  for depth, length in ((1, 8), (2, 8), (3, 8), (3, 4))]
    one, two, three, shorter = counts
    assert three - two == two - one > 0
    assert shorter == three


# -- measuring -------------------------------------------------------------------------------------

def test_arms_are_called_in_turn(lab):
    called = []
    lab.measure("part", {name: lambda name=name: called.append(name) for name in "abc"}, 4, 8)
    # first all FLOPs, then all launches, then four rounds of the clock
    assert "".join(called) == "abc" * (1 + 1 + 4)
    assert lab.figures()["part: a, width 8, fp32", "ratio"] == "1"


def test_rates_are_relative_to_the_bare_products_of_the_same_width(lab):
    x = torch.randn(64, 64)
    for part, width in (speed.MATMUL, 8), ("part", 8), ("part", 16):
        lab.measure(part, dict(x=lambda: x @ x), 3, width)
    figures = lab.figures()
    limit, arm = f"{speed.MATMUL}: x, width 8, fp32", "part: x, width 8, fp32"
    assert figures[limit, "of_matmul"] == "1"
    expected = float(figures[arm, "GFLOP/s"]) / float(figures[limit, "GFLOP/s"])
    assert float(figures[arm, "of_matmul"]) == pytest.approx(expected, rel=0.02)
    # at width 16 there is nothing to compare with
    assert ("part: x, width 16, fp32", "of_matmul") not in figures


def test_launches_are_stored_per_generated_token(lab):
    x = torch.randn(8)
    lab.measure("part", dict(x=lambda: [x.exp() for _ in range(6)]), 1, 8, tokens=3)
    assert lab.figures()["part: x, width 8, fp32", "launches"] == "2"


def test_an_endless_model_says_as_much_as_it_is_asked_for(lab, monkeypatch):
    """Even where each token is the one that ends an answer elsewhere."""
    lab.corpus = any_word()
    model = speed.endless(lab, 32, 9)
    last = model.cfg.vocab_size - 1
    monkeypatch.setattr(tjepa, "sample_token", lambda logits, *_: torch.tensor(2 * [last]))
    thought = tjepa.Thought(torch.randn(2, 32), torch.zeros(2, 0), torch.zeros(2, 0))
    assert len(list(model.speak(thought))) == 9


# -- the lab as a whole ----------------------------------------------------------------------------

def test_fast_runs_every_arm_and_prints_a_line_for_each(fast):
    rows, printed = fast
    names = list(dict.fromkeys(row["arm"] for row in rows))
    assert printed[-len(names):] == [f"{name}: ran" for name in names]
    assert list(rows[0]) == records.COLUMNS
    for width in speed.FAST.widths:
        here = [name.split(": ")[1].split(",")[0] for name in names
                if name.startswith("Training step") and f"width {width}," in name]
        assert here == ["nanoGPT", "GPT of our blocks", "phase 1", "phase 2", "phase 3", "phase 1"]
    work = {row["arm"].split(": ")[1].split(",")[0]: float(row["value"]) for row in rows
            if row["figure"] == "GFLOP" and row["arm"].startswith("Cheaper phase 1")}
    assert list(work) == ["default", "pred_embd=16", "mask_ratio=0.5", "loss=mse"]
    assert max(work["pred_embd=16"], work["loss=mse"]) < work["default"]
    launches = {row["arm"]: int(row["value"]) for row in rows if row["figure"] == "launches"
                and row["arm"].startswith("Phase 1 with --compile")}
    if launches:
        eager, compiled = launches.values()
        assert 0 < compiled < 0.8 * eager


def test_the_table_shows_the_newest_measurement_of_an_arm():
    def row(value, commit, figure="ms", device="a CPU"):
        return dict(arm="Training step: x", figure=figure, value=value, commit=commit,
                    device=device)
    rows = [row("5", "old"), row("9", "old", "note"), row("7", "old", device="a GPU"),
            row("3", "new")]
    assert speed.text_of(rows).splitlines() == [
        "Training step, on a CPU:", "",
        "| arm | ms | ratio | GFLOP | GFLOP/s | of_matmul | launches | note |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| x | 3 |  |  |  |  |  |  |", "",
        "Training step, on a GPU:", "",
        "| arm | ms | ratio | GFLOP | GFLOP/s | of_matmul | launches | note |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| x | 7 |  |  |  |  |  |  |"]


# -- bad input -------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, complaint", (
    (["--nanogpt=/nowhere"], "model.py"),
    (["--fast", "--table=README.md"], "--fast"),
    (["--nanogtp=x"], "did you mean --nanogpt")))
def test_bad_flags_end_with_one_line_and_code_2(argv, complaint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["labs.speed", *argv])
    with pytest.raises(SystemExit) as stop:
        arms.main(speed.speed, speed.Flags)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert "error:" in error and complaint in error and "\n" not in error
