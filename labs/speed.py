"""
How fast is a step, how fast could this machine be, and what would you have used instead?

    python -m labs.speed --nanogpt=../nanoGPT   about 25 minutes on 2 cores; leave the machine alone meanwhile
    python -m labs.speed                        the same without nanoGPT's own model.py beside ours
    python -m labs.speed --fast                 does it run?

Expected before the first run: by FLOPs phase 1 of latents alone costs .85 / .97 / 1.04 of a GPT's step at width 128 /
256 / 512, with a predictor half as wide (what is removed is absent from the online encoder, the target has no backward
pass), and by the clock too if our code is tight. Counted since: the default, with words and a wider predictor, costs
1.13 / 1.24 / 1.31, latents alone .83 / .94 / 1.01. All that is called phase 1 and T-JEPA here is the default, where it
does not say otherwise.
Thinking once saves time in long answers only, and because the decoder is shallow: a question costs what it costs a GPT.

What is compared is called in turn, A B C A B C ..., so that a busy moment hits all alike: trust ratios, not times.
Times are medians of 20 calls after warm-up (of 10 in growth, of 3 for 256 tokens), ratio is over the first row of a
width. FLOPs come from torch.utils.flop_counter on one call, of all models alike: 2 a multiply-add of each product of
matrices, forward and back, attention as full squares even if causal; norms, GELU, softmax, look-ups, optimizer and EMA
count nothing. of_matmul is FLOP/s over those of a block's four bare products for as many tokens. bf16 is measured where
--dtype=auto chooses it.
"""
import csv
import dataclasses
import importlib.util
import itertools
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import tjepa
import train
from flags import read_flags
from labs.arms import commit, results
from labs.controls import GPT
from labs.tables import markdown, over_seeds, publish


@dataclasses.dataclass
class Flags:
    """Flags of the speed lab."""
    nanogpt: str = ""           # folder of a checkout of karpathy/nanoGPT: its model.py is measured too
    threads: int = 0            # CPU threads; 0 = as many as torch takes by itself
    text: str = ""              # text the tokenizer is trained on, repeated to 1 and 10 MB; without it the shipped one
    out: str = "out/labs"       # folder of speed.csv and speed.png
    results: str = "labs/results"   # folder of the results files, relative to the repository: exact match is read there
    fast: bool = False          # a little of everything: does it run? The figures mean nothing
    table: str = ""             # write the table into this file, between its markers, instead of only printing it

    def __post_init__(self):
        tjepa.check(self, [
            ("threads", lambda n: n >= 0, "0 (as many as torch takes by itself) or more"),
            ("table", lambda path: not (path and self.fast), "left out with --fast, which measures nothing"),
            ("text", lambda path: not path or Path(path).is_file(), "a UTF-8 text file, and there is none"),
            ("nanogpt", lambda path: not path or Path(path, "model.py").is_file(),
             "the folder of a checkout of karpathy/nanoGPT, and it has no model.py")])

# every: steps of phases 2 and 3 draw from each so-manieth question, evaluations read each so-manieth
FULL = dict(widths=(128, 256, 512), rows=48, calls=20, said=256, said_calls=3, batches=(1, 64), answers=(1, 4, 16, 64),
            every=(16, 1), peaks=(128, 512), text=(10 ** 6, 10 ** 7), growth=dict(
                rows=(12, 24, 48, 96), width=(64, 128, 256, 512), block_size=(64, 128, 256, 512, 1024)))
FAST = dict(widths=(32, 64), rows=4, calls=2, said=8, said_calls=1, batches=(1, 2), answers=(1, 4), every=(64, 64),
            peaks=(32,), text=(10 ** 4,), growth=dict(rows=(2, 4), width=(32, 64), block_size=(64, 128)))
CFG, MATMUL = train.Config(), "Matrix products of a block"
COLUMNS = "part what width dtype ms MB exponent ratio GFLOP GFLOP/s of_matmul note commit".split()

def count_flops(act):
    """FLOPs of one call. The counter knows fused attention on GPUs only, so attention is taken apart for it."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        act()
    return counter.get_total_flops()

class Lab:
    """What the parts share: corpus, device, sizes, a clock, and the rows, on disk the moment they are measured."""
    def __init__(self, flags):
        self.flags, self.size = flags, SimpleNamespace(**(FAST if flags.fast else FULL))
        self.ends = self.size.widths[::len(self.size.widths) - 1]       # the narrowest and the widest
        self.device, bf16 = train.pick_device(CFG)
        self.dtypes = {"fp32": None} | ({"bf16": bf16} if bf16 else {})
        self.corpus, self.rows, self.limits = data.load(CFG), [], {}    # limits: (width, dtype) -> matmul's GFLOP/s
        tokenizer, name = self.corpus.tokenizer, "the shipped text"
        self.rows_of = partial(data.Text, self.corpus.train.tokens, tokenizer=tokenizer, name=name)     # of any length
        qa = sorted(self.corpus.qa, key=lambda row: len(row.answer))
        longest = max(qa, key=lambda row: len(row.question))            # with the longest answer it sets all padding
        self.some, self.all = (data.Questions([longest, *qa[::-n]], tokenizer, CFG.block_size, CFG.answer_size,
                                              self.device) for n in self.size.every)
        self.path = Path(flags.out) / f"speed{'-fast' * flags.fast}.csv"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.commit = commit()

    def time(self, act):
        """Milliseconds of one call; a GPU is waited for."""
        started = time.perf_counter()
        act()
        getattr(torch, self.device).synchronize()
        return 1e3 * (time.perf_counter() - started)

    def measure(self, part, arms, calls, width="", shares={}, notes={}):
        """Time arms, (name, dtype) -> function, in turn, a row each; returns their milliseconds. An arm in shares does
        so much of the work, of which its row tells the whole."""
        gflop = [count_flops(act) / 1e9 / shares.get(arm, 1) for arm, act in arms.items()]
        rounds = [[self.time(act) for act in arms.values()] for _ in range(1 + calls)][1:]
        ms = [np.median(found) / shares.get(arm, 1) for arm, found in zip(arms, zip(*rounds))]
        for (name, dtype), work, each in zip(arms, gflop, ms):
            rate = work / each * 1e3
            limit = self.limits.setdefault((width, dtype), rate if part == MATMUL else np.inf)  # it is measured first
            self.add(part, name, width, dtype, ms=each, ratio=each / ms[0], note=notes.get(name, ""), GFLOP=work,
                     **{"GFLOP/s": rate, "of_matmul": rate / limit})
        return ms

    def add(self, part, what, width="", dtype="", **cells):
        """One row, on the screen and on disk."""
        cells = {name: x if isinstance(x, str) else f"{x:.0f}" if x >= 100 else f"{x:.3g}"
                 for name, x in cells.items() if x}
        self.rows.append(dict(part=part, what=what, width=width, dtype=dtype, commit=self.commit) | cells)
        with open(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        print(part, what, width, dtype, cells, flush=True)

    def table(self, part):
        """The rows of a part in markdown."""
        rows = [row for row in self.rows if row["part"] == part]
        names = [name for name in COLUMNS[1:-1] if any(row.get(name) for row in rows)]
        return f"{part}:\n\n" + markdown([names, *([str(row.get(name, "")) for name in names] for row in rows)])

# -- what a student would use instead ----------------------------------------------------------------------------------
def shape(width):
    """The fields of a Config that follow from the width: heads of 32, a predictor as wide."""
    return dict(n_embd=width, n_head=width // 32, pred_embd=width)

def gpt_of(width, depth=CFG.n_layer, size=CFG.block_size):
    """The control, of our blocks."""
    return GPT(tjepa.Config(**shape(width), vocab_size=CFG.vocab_size, n_layer=depth, top_k=1), size)

def nanogpt(lab, width, size=CFG.block_size):
    """nanoGPT in the encoder's shape, and the optimizer that it configures, from a model.py that is imported from where
    it lies: nothing of it is part of this repository. It prints its size, which nobody asked for."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(lab.flags.nanogpt, "model.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with redirect_stdout(None):
        model = module.GPT(module.GPTConfig(size, CFG.vocab_size, CFG.n_layer, width // 32, width, 0.0, bias=False))
        return model.to(lab.device), model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), lab.device)

# -- training steps ----------------------------------------------------------------------------------------------------
def gpt_step(lab, model, optimizer, dtype=None):
    """The step of a GPT, ours or nanoGPT's: as phase 3 takes it, without an EMA."""
    text, run = lab.rows_of(CFG.block_size + 1), train.Run(CFG, model, lab.corpus, lab.device, dtype)
    def loss_at(progress):
        """Cross-entropy of rows of text, drawn anew."""
        rows = text.batch(lab.size.rows).to(lab.device, non_blocking=True)              # (B, T + 1)
        return model(rows[:, :-1], rows[:, 1:].masked_fill(rows[:, 1:] == text.pad, -1).contiguous())[1], {}
    return partial(train.take_step, run, "speak", optimizer, loss_at, 0.5)

def phase(lab, name, dtype, questions=None, **changes):
    """(run, step, measure) of a phase of train.py, untrained."""
    cfg = dataclasses.replace(CFG, **{"batch_size": lab.size.rows, **changes})
    run = train.Run(cfg, train.build(cfg, lab.corpus.tokenizer).to(lab.device),
                    lab.corpus._replace(train=lab.rows_of(cfg.block_size)), lab.device, dtype)
    more = [questions, train.teach(run, questions, None)] if name != "pretrain" else []
    loss_at, measure = getattr(train, name)(run, *more)
    return run, partial(train.take_step, run, name, train.optimizer_for(run, name, None), loss_at, 0.5), measure

def products(lab, width, dtype):
    """The four bare products of a block, for the tokens of a step."""
    n = lab.size.rows * CFG.block_size
    made = [[torch.randn(size, width * i, device=lab.device, dtype=dtype) for size in (n, width * o)]
            for i, o in ((1, 3), (1, 1), (1, 4), (4, 1))]
    return lambda: [F.linear(x, weight) for x, weight in made]

def steps(lab):
    """The bare products, which are the limit; then nanoGPT, the control and the three phases."""
    for width in lab.size.widths:
        lab.measure(MATMUL, {("C-3C, C-C, C-4C, 4C-C", name): products(lab, width, dtype) for name, dtype in (
            ("fp32", torch.float32), ("bf16", torch.bfloat16))}, lab.size.calls, width)
        arms = {("nanoGPT", "fp32"): gpt_step(lab, *nanogpt(lab, width))} if lab.flags.nanogpt else {}
        for name, dtype in lab.dtypes.items():
            gpt = gpt_of(width).to(lab.device)
            adamw = torch.optim.AdamW(train.groups([gpt], CFG.weight_decay), fused=True)
            arms["GPT of our blocks", name] = gpt_step(lab, gpt, adamw, dtype)
            for i, kind in enumerate(train.PHASES, 1):
                arms[f"phase {i}, {kind}", name] = phase(lab, kind, dtype, lab.some, **shape(width))[1]
            latent = shape(width) | dict(mlm=0.0, pred_embd=width // 2)
            arms["phase 1, latents alone", name] = phase(lab, "pretrain", dtype, **latent)[1]
        lab.measure("Training step", arms, lab.size.calls, width)

def growth(lab):
    """Phase 1 against rows, width and block size (at as many tokens), and the exponents that fit best."""
    narrow, tokens = shape(lab.ends[0]), lab.size.rows * CFG.block_size
    changes = dict(rows=lambda n: narrow | dict(batch_size=n), width=shape,
                   block_size=lambda n: narrow | dict(block_size=n, batch_size=tokens // n))
    for what, points in lab.size.growth.items():
        arms = {(f"{what} {n}", "fp32"): phase(lab, "pretrain", None, **changes[what](n))[1] for n in points}
        slope = np.polyfit(np.log(points), np.log(lab.measure("Growth of phase 1", arms, lab.size.calls // 2)), 1)[0]
        lab.add("Growth of phase 1", f"{what}: time grows with its power", exponent=slope)

# -- speaking ----------------------------------------------------------------------------------------------------------
def endless(lab, width, size):
    """An untrained model in which no token ends an answer: it says as much as it is asked for, at most size tokens."""
    cfg = type("Endless", (tjepa.Config,), dict(eos=-1))(**shape(width), vocab_size=CFG.vocab_size, answer_size=size)
    return tjepa.TJEPA(cfg, lab.corpus.tokenizer.word_start).to(lab.device)

@torch.no_grad()
def generation(lab):
    """Saying 256 tokens, drawn at temperature 1. Without a cache a token costs more the later it comes; for a batch, 4
    lengths, spread evenly, stand for all."""
    for width, batch in itertools.product(lab.ends, lab.size.batches):
        n, model = lab.size.said, endless(lab, width, lab.size.said)
        lengths = range(1, n + 1) if batch == 1 else range(n // 8, n + 1, n // 4)
        empty, words = torch.zeros(batch, 0, device=lab.device), torch.randint(n, (batch, n), device=lab.device)
        thought = tjepa.Thought(torch.randn(batch, width, device=lab.device), empty, empty)
        def uncached():
            """All that was said is read again for each token."""
            memory = model.decoder.memory(thought)
            for i in lengths:
                logits = model.decoder.token_head(model.decoder(words[:, :i], *memory)[:, -1])          # (B, V)
                tjepa.pick(logits, temperature=1.0)
        def cached(dtype):
            """As sample.py does."""
            with torch.autocast(lab.device, dtype, enabled=dtype is not None):
                list(model.speak(thought, temperature=1.0))
        arms = {("decoder, no cache", "fp32"): uncached}
        if lab.flags.nanogpt:
            theirs, calls = nanogpt(lab, width, n)[0], [(1, n)] if batch == 1 else [(i, 1) for i in lengths]
            arms = {("nanoGPT's generate", "fp32"): lambda: [theirs.generate(words[:, :i], k) for i, k in calls]} | arms
        shares = dict.fromkeys(arms, len(lengths) / n)
        arms |= {("decoder, KV cache", name): partial(cached, dtype) for name, dtype in lab.dtypes.items()}
        lab.measure(f"Saying {n} tokens, {batch} at a time", arms, lab.size.said_calls, width, shares)

@torch.no_grad()
def thinking(lab):
    """Think once, then say n tokens; against GPTs that read the question and say them, with a KV cache."""
    lengths = (lab.some.tokens != lab.corpus.tokenizer.pad).sum(1)                      # (N,)
    row, V = lengths.argsort()[len(lengths) // 2], CFG.vocab_size
    question = lab.some.tokens[row:row + 1, :lengths[row]]                              # (1, Q), of middling length
    def match(arm, width):
        """Exact match of an arm of the facts lab, in words; it knows one width."""
        said = {split: over_seeds(known, arm, f"em_{split}_heldout") for split in ("DEC", "LAT")}
        found = [f"{split} {em.mean:.2f}" for split, em in said.items() if em and width == CFG.n_embd]
        return "exact match " + (", ".join(found) or "not measured")
    known = [] if lab.flags.fast else results("facts", lab.flags)
    for width, n in itertools.product(lab.ends, lab.size.answers):
        model = endless(lab, width, max(4, n))
        ours = lambda: list(itertools.islice(model.speak(model.think(question)), n))
        gpt = lambda depth: partial(gpt_of(width, depth, question.size(1) + n).to(lab.device).generate, question, n)
        params = sum(p.numel() for part in (model.encoder, model.predictor, model.decoder) for p in part.parameters())
        flops, one, two = map(count_flops, (ours, gpt(1), gpt(2)))              # a GPT's grow with its depth, linearly
        depths = {"GPT of equal parameters": round((params - (V + 1) * width) / (12 * width + 2) / width),
                  "GPT of equal FLOPs": max(1, round(1 + (flops - one) / (two - one)))}
        notes = {name: f"{depth} layers, " + match(f"GPT of {depth} layers" if depth != CFG.n_layer else "GPT", width)
                 for name, depth in depths.items()} | {"T-JEPA": match("default", width)}
        arms = {(name, "fp32"): gpt(depth) for name, depth in depths.items()} | {("T-JEPA", "fp32"): ours}
        lab.measure(f"Question of {question.size(1)} tokens, answer of {n}", arms, lab.size.calls, width, notes=notes)

# -- what surrounds the steps ------------------------------------------------------------------------------------------
def children(lab):
    """Peak memory, import and --help, each in a process of its own. They come first, while this process is small: on
    Linux a child's peak begins with the memory of its parent."""
    def python(*argv):
        """The words that a process of its own prints."""
        root = Path(train.__file__).parent
        return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=root).stdout.split()
    for width in lab.size.peaks:
        with tempfile.TemporaryDirectory() as out:
            printed = python("-c", f"""import sys, torch, train
train.run(train.Config(phase="pretrain", pretrain_steps=3, out={out!r}, **{shape(width)}))
print(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else
      __import__("resource").getrusage(0).ru_maxrss * (1 if sys.platform == "darwin" else 1024))""")
        lab.add("Around", "peak memory of phase 1", width, MB=float(printed[-1]) / 1e6 if printed else "not measured")
    code = "import torch, time; t = time.perf_counter(); import tjepa; print(1e3 * (time.perf_counter() - t))"
    calls = range(lab.size.said_calls)
    lab.add("Around", "import of tjepa, after torch", ms=np.median([float(python("-c", code)[0]) for _ in calls]))
    lab.add("Around", "train.py --help", ms=np.median([lab.time(lambda: python("train.py", "--help")) for _ in calls]))

def around(lab):
    """Loading, masking, checkpoint, evaluation, tokenizer, at the narrowest width."""
    run, step, _ = phase(lab, "pretrain", None, **shape(lab.ends[0]))
    cfg, tokens = run.model.cfg, run.corpus.train.batch(lab.size.rows).to(lab.device)
    def mask():
        """What a step does before the encoders."""
        spans = tjepa.sample_spans(tokens, run.model.word_start, cfg)
        tjepa.split_spans(spans, tokens, round(cfg.block_size * cfg.mask_ratio), cfg)
    with tempfile.TemporaryDirectory() as out:
        state = dict(model=run.model.state_dict(), optimizer=train.optimizer_for(run, "pretrain", None).state_dict())
        arms = {"step of phase 1": step, "of it loading": lambda: run.corpus.train.batch(lab.size.rows),
                "of it masking": mask, "writing a checkpoint": lambda: train.save_checkpoint(out, state)}
        lab.measure("Around", {(what, "fp32"): act for what, act in arms.items()}, lab.size.calls, cfg.n_embd)
    for name in train.PHASES:
        measure = phase(lab, name, None, lab.all, **shape(lab.ends[0]))[2]
        for when, whole in ("between", False), ("at the end", True):
            lab.add("Around", f"evaluation of {name}, {when}", cfg.n_embd, "fp32", ms=lab.time(partial(measure, whole)))
    text = data.read_text(lab.flags.text) if lab.flags.text else (
        run.corpus.tokenizer.decode(run.corpus.train.tokens.tolist()))
    for size in lab.size.text:
        act = partial(data.train_bpe, (text * (size // len(text) + 1))[:size], CFG.vocab_size - 4)
        lab.add("Around", f"training a tokenizer on {size / 1e6:g} MB", ms=lab.time(act),
                note=f"text of {len(text) / 1e6:.1f} MB{', repeated' * (size > len(text))}")

def draw(lab):
    """speed.png: FLOP/s over those of the bare products, a bar a row, a colour a width."""
    from matplotlib.figure import Figure        # here and not above: --help should not wait for it
    rows = [row for row in lab.rows if "of_matmul" in row and row["width"]][::-1]
    figure = Figure(figsize=(10, 1 + 0.2 * len(rows)), layout="constrained")
    axis = figure.add_subplot(title="FLOP/s over those of a block's bare products")
    axis.barh(range(len(rows)), [float(row["of_matmul"]) for row in rows],
              color=[f"C{lab.size.widths.index(row['width'])}" for row in rows])
    axis.set_yticks(range(len(rows)), ["{part}: {what}, {width}, {dtype}".format(**row) for row in rows], fontsize=7)
    figure.savefig(lab.path.with_suffix(".png"))

def main(argv=None):
    """Measure everything, draw, write the table. Bad input is one line and exit code 2."""
    try:
        flags = Flags(**read_flags(Flags, argv, "labs.speed"))
        torch.set_num_threads(flags.threads or torch.get_num_threads())
        lab = Lab(flags)
        for part in (children, steps, growth, generation, thinking, around):
            part(lab)
        draw(lab)
        parts = dict.fromkeys(row["part"] for row in lab.rows)
        publish("speed", lab.rows, "\n\n".join(map(lab.table, parts)), flags.table)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
