"""The speed lab measures what it says; how fast anything is, is not tested."""
import csv
import re

import pytest
import torch

import tjepa
from labs import records, speed

# what of nanoGPT's model.py the lab relies on, without a word of it
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
        print("noise")
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas)
    def forward(self, idx, targets):
        logits = self.head(self.embed(idx))
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    def generate(self, idx, n):
        return idx
'''


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    """The whole lab with --fast, beside a stand-in for nanoGPT: the folder of its results."""
    out = tmp_path_factory.mktemp("speed")
    (out / "model.py").write_text(STAND_IN)
    (out / "text.txt").write_text("to be or not to be, that is the question\n" * 30)
    speed.main(["--fast", f"--out={out}", f"--nanogpt={out}", f"--text={out / 'text.txt'}"])
    return out


@pytest.fixture
def lab(tmp_path):
    """A lab that has read no corpus: its clock and its rows."""
    lab = object.__new__(speed.Lab)
    lab.device, lab.rows, lab.limits, lab.path, lab.commit = "cpu", [], {}, tmp_path / "speed.csv", "abc"
    return lab


def gpt(depth=2, size=8):
    torch.manual_seed(0)
    return speed.gpt_of(32, depth, size)


def words(rows, length):
    torch.manual_seed(1)
    return torch.randint(2000, (rows, length))


# -- the control -------------------------------------------------------------------------------------------------------

def test_the_control_is_causal():
    model, tokens = gpt(), words(2, 8)
    logits, _ = model(tokens, tokens)
    for place in range(8):
        changed = tokens.clone()
        changed[:, place] += 1
        moved = (model(changed, tokens)[0] - logits).abs().amax(-1)                     # (B, T)
        assert (moved[:, :place] < 1e-6).all() and (moved[:, place] > 1e-6).all()


@pytest.mark.parametrize("depth", (1, 3))
def test_the_control_has_the_parameters_that_its_docstring_states(depth):
    V, C = speed.CFG.vocab_size, 32
    assert sum(p.numel() for p in gpt(depth).parameters()) == V * C + depth * (12 * C * C + 2 * C) + C


def test_the_control_says_with_its_cache_what_it_says_without():
    model, said = gpt(), words(3, 4)
    for _ in range(4):
        said = torch.cat((said, model(said)[0].argmax(-1)), dim=1)
    assert torch.equal(model.generate(words(3, 4), 4), said[:, 4:])


def test_the_controls_loss_is_that_of_the_next_token_and_skips_padding():
    model, tokens, targets = gpt(), words(2, 8), words(2, 8)
    targets[:, 5:] = -1
    logits, loss = model(tokens, targets)
    each = -torch.log_softmax(logits, -1).gather(2, targets.clamp(min=0)[..., None])[..., 0]            # (B, T)
    assert torch.allclose(loss, each[:, :5].mean())


# -- counting ----------------------------------------------------------------------------------------------------------

def block_flops(tokens, keys, width):
    """Forward, by hand: 12 C^2 multiply-adds a token, and q k^T and its product with v over all keys."""
    return 2 * tokens * (12 * width ** 2 + 2 * keys * width)


def test_flops_of_the_control_are_those_counted_by_hand():
    B, T, C, V, depth = 3, 8, 32, speed.CFG.vocab_size, 2
    model, tokens = gpt(depth, T), words(B, T)
    forward = depth * block_flops(B * T, T, C) + 2 * B * T * C * V
    with torch.no_grad():
        assert speed.count_flops(lambda: model(tokens, tokens)) == forward
    assert speed.count_flops(lambda: model(tokens, tokens)[1].backward()) == 3 * forward   # with 2 gradients each


def test_flops_of_the_encoder_are_those_counted_by_hand():
    cfg = tjepa.Config(**speed.shape(64), block_size=16)
    model = tjepa.TJEPA(cfg, torch.ones(cfg.vocab_size, dtype=torch.bool))
    with torch.no_grad():
        assert speed.count_flops(lambda: model.encode(words(2, 16))) == cfg.n_layer * block_flops(2 * 16, 16, 64)


@pytest.mark.parametrize("width", (32, 96))
def test_flops_of_the_bare_products_are_those_of_a_block_without_attention(lab, width):
    lab.size = speed.SimpleNamespace(rows=2)
    tokens = 2 * speed.CFG.block_size
    assert speed.count_flops(speed.products(lab, width, torch.float32)) == block_flops(tokens, 0, width)


def test_attention_is_counted_as_a_full_square_whatever_hides_half_of_it():
    q = torch.randn(2, 4, 8, 16)                                                        # (B, nh, T, hs)
    for how in dict(), dict(is_causal=True), dict(attn_mask=torch.ones(2, 1, 1, 8, dtype=torch.bool)):
        attend = torch.nn.functional.scaled_dot_product_attention
        assert speed.count_flops(lambda: attend(q, q, q, **how)) == 2 * (2 * 2 * 4 * 8 * 8 * 16)


@pytest.mark.parametrize("width, share, latent", ((128, 1.13, 0.83), (256, 1.24, 0.94), (512, 1.31, 1.01)))
@pytest.mark.parametrize("recipe", ("default", "latent"))
def test_phase_1_costs_the_share_of_a_gpts_flops_that_the_docstring_expects(width, share, latent, recipe):
    share, change = dict(default=(share, {}), latent=(latent, dict(mlm=0, pred_embd=width // 2)))[recipe]
    cfg, tokens = tjepa.Config(**speed.shape(width) | change, sigreg=0), words(1, 65)   # sigreg's: the same for all rows
    model = tjepa.TJEPA(cfg, torch.ones(cfg.vocab_size, dtype=torch.bool))
    model.target.requires_grad_(False)
    spans = tjepa.sample_spans(tokens[:, 1:], model.word_start, cfg)
    ours = speed.count_flops(lambda: model.pretrain_loss(tokens[:, 1:], spans)[0].backward())
    control = speed.gpt_of(width)
    theirs = speed.count_flops(lambda: control(tokens[:, :-1], tokens[:, 1:])[1].backward())
    assert ours / theirs < share + 0.01         # more than it says would be a slower phase 1


# -- measuring ---------------------------------------------------------------------------------------------------------

def test_arms_are_called_in_turn(lab):
    called = []
    lab.measure("part", {(name, "fp32"): lambda name=name: called.append(name) for name in "abc"}, 4)
    assert "".join(called) == "abc" * (1 + 1 + 4)           # one to count FLOPs, one to warm up
    assert [row["what"] for row in lab.rows] == list("abc") and float(lab.rows[0]["ratio"]) == 1


def test_an_arm_that_does_a_share_of_the_work_tells_the_whole(lab):
    x = torch.randn(8, 8)
    arms = {(name, "fp32"): lambda: x @ x for name in ("whole", "share")}
    lab.measure("part", arms, 1, 8, shares={("share", "fp32"): 0.25})
    whole, share = lab.rows
    assert float(share["GFLOP"]) == pytest.approx(4 * float(whole["GFLOP"]), rel=0.01)


def test_rates_are_relative_to_the_bare_products_of_the_same_width_and_dtype(lab):
    x = torch.randn(64, 64)
    for part, width in (speed.MATMUL, 8), ("part", 8), ("part", 16):
        lab.measure(part, {("x", "fp32"): lambda: x @ x}, 3, width)
    limit, row, other = lab.rows
    assert float(limit["of_matmul"]) == 1 and "of_matmul" not in other      # nothing to compare that one with
    assert float(row["of_matmul"]) == pytest.approx(float(row["GFLOP/s"]) / float(limit["GFLOP/s"]), rel=0.02)


def test_each_row_is_on_disk_when_it_is_measured(lab):
    for n in (1, 2, 3):
        lab.add("part", f"row {n}", ms=n)
        assert [row["what"] for row in csv.DictReader(open(lab.path))] == [f"row {i + 1}" for i in range(n)]


def test_an_endless_model_says_as_much_as_it_is_asked_for(lab):
    lab.corpus = speed.SimpleNamespace(tokenizer=speed.SimpleNamespace(word_start=[True] * speed.CFG.vocab_size))
    model = speed.endless(lab, 32, 9)
    thought = tjepa.Thought(torch.randn(2, 32), torch.zeros(2, 0), torch.zeros(2, 0))
    assert len(list(model.speak(thought))) == 9


# -- the lab as a whole ------------------------------------------------------------------------------------------------

def test_fast_writes_every_row_of_the_table_and_the_figure(fast, capsys):
    rows = list(csv.DictReader(open(fast / "speed-fast.csv")))
    parts = list(dict.fromkeys(row["part"] for row in rows))
    assert {"Around", speed.MATMUL, "Training step", "Growth of phase 1"} < set(parts) and len(parts) == 8
    assert (fast / "speed-fast.png").stat().st_size > 10_000
    lab = object.__new__(speed.Lab)
    lab.rows = [{name: cell for name, cell in row.items() if cell} for row in rows]
    text = "\n".join(map(lab.table, parts))
    assert len(re.findall(r"^\| (?!what|---)", text, re.MULTILINE)) == len(rows)
    assert list(rows[0]) == speed.COLUMNS and all(row["ms"] or row["MB"] or row["exponent"] for row in rows)
    for row in rows:
        assert f"| {row['what']} |" in text


def test_every_phase_and_model_has_a_step_at_every_width(fast):
    rows = [row for row in csv.DictReader(open(fast / "speed-fast.csv")) if row["part"] == "Training step"]
    for width in speed.FAST["widths"]:
        here = [row for row in rows if row["width"] == str(width) and row["dtype"] == "fp32"]
        names = [row["what"].split(",")[0] for row in here]
        assert names == ["nanoGPT", "GPT of our blocks", "phase 1", "phase 2", "phase 3", "phase 1"]
        assert float(here[0]["ratio"]) == 1 and all(0 < float(row["of_matmul"]) for row in here)


def test_a_cache_saves_flops_and_a_batch_costs_as_many_times_more(fast):
    rows = [row for row in csv.DictReader(open(fast / "speed-fast.csv")) if row["what"].startswith("decoder")]
    gflop = {(row["part"][-len("1 at a time")], row["what"], row["width"]): float(row["GFLOP"]) for row in rows}
    for width in "32", "64":
        one, two, none = (gflop[key, f"decoder, {how}", width] for key, how in (
            ("1", "KV cache"), ("2", "KV cache"), ("1", "no cache")))
        assert two == pytest.approx(2 * one, rel=0.02) and one < none / 2


def test_exact_match_stands_beside_the_cost_where_the_facts_lab_has_measured_it(fast, lab, monkeypatch):
    rows = [row for row in csv.DictReader(open(fast / "speed-fast.csv")) if row["part"].startswith("Question")]
    assert rows and all("exact match not measured" in row["note"] for row in rows)
    for name, seed, em in ("default", 0, 0.5), ("default", 1, 0.7), ("GPT of 12 layers", 0, 0.9):
        for split, value in ("DEC", em), ("LAT", em / 2):
            row = dict(arm=name, seed=seed, figure=f"em_{split}_heldout", value=value, seeds=1)
            records.append(fast / "facts.csv", [row])
    lab.size, lab.ends = speed.SimpleNamespace(answers=(1,), calls=1), (speed.CFG.n_embd,)
    lab.flags = speed.SimpleNamespace(out=fast, results=fast, fast=False)
    lab.some = speed.SimpleNamespace(tokens=words(5, 6))
    lab.corpus = speed.SimpleNamespace(tokenizer=speed.SimpleNamespace(
        pad=speed.CFG.pad, word_start=[True] * speed.CFG.vocab_size))
    speed.thinking(lab)
    notes = {row["what"]: row["note"] for row in lab.rows}
    assert notes["T-JEPA"] == "exact match DEC 0.60, LAT 0.30"
    assert notes["GPT of equal parameters"] == "12 layers, exact match DEC 0.90, LAT 0.45"
    assert notes["GPT of equal FLOPs"].endswith("layers, exact match not measured")


# -- bad input ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, words", (
    (["--nanogpt=/nowhere"], "model.py"), (["--threads=-1"], "threads"), (["--fast", "--table=README.md"], "--fast"),
    (["--nanogtp=x"], "did you mean --nanogpt"), (["--text=/nowhere.txt", "--fast"], "nowhere.txt")))
def test_bad_flags_end_with_one_line_and_code_2(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        speed.main(argv)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "error:" in error and words in error and "\n" not in error
