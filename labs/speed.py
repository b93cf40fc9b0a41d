"""
How fast is a training step, how fast could this machine be, and what would a GPT cost?

    python -m labs.speed --nanogpt=../nanoGPT   15 minutes on 2 cores; run nothing else meanwhile
    python -m labs.speed                        the same without nanoGPT's own model.py
    python -m labs.speed --fast                 a quarter of a minute on one core: does it run?

Expected before the first run: by FLOPs phase 1 costs as much as a GPT's step (counted since: 1.13 /
1.24 / 1.31 of it at width 128 / 256 / 512). Thinking once saves time in long answers only, because
the decoder is shallow.

Functions that are compared are called in turn, A B C A B C ..., so that a busy moment of the
machine hits all of them: trust ratios more than times. The figures of an arm:

    ms          median over 20 calls after a warm-up (3 calls for 256 tokens)
    ratio       ms over those of the first arm of the same width
    GFLOP       by torch.utils.flop_counter: 2 per multiply-add of each matrix product, forward and
                backward; causal attention counts as a full square
    of_matmul   FLOP/s over those of the four bare matrix products of a block
    launches    kernels that a GPU would launch, of a step or of one generated token
"""
import dataclasses
import importlib.util
import itertools
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import data
import tjepa
import train
from labs import arms, records
from labs.controls import GPT
from labs.tables import markdown, publish

@dataclasses.dataclass
class Flags:
    """Flags of the speed lab."""
    nanogpt: str = ""           # folder of a checkout of karpathy/nanoGPT: its model.py is measured
    threads: int = 0            # CPU threads; 0 = as many as torch takes by itself
    out: str = "out/labs"       # folder of speed-fast.csv
    results: str = "labs/results"   # folder of speed.csv, relative to the repository
    fast: bool = False          # a few calls of everything, to see that it runs
    table: str = ""             # also write the table into this file, between its markers

    def __post_init__(self):
        has_model = not self.nanogpt or Path(self.nanogpt, "model.py").is_file()
        tjepa.check(self, [
            ("threads", lambda n: n >= 0, "0 or more"),
            ("table", lambda path: not (path and self.fast), "left out: --fast measures nothing"),
            ("nanogpt", lambda path: has_model, "a checkout of karpathy/nanoGPT, with model.py"),
        ])

# rows of text a step; tokens to generate; lengths of an answer; questions: each so-manieth
FULL = SimpleNamespace(widths=(128, 256, 512), rows=48, calls=20, said=256, said_calls=3,
                       answers=(1, 4, 16, 64), every=16)
FAST = SimpleNamespace(widths=(32, 64), rows=4, calls=2, said=8, said_calls=1,
                       answers=(1, 4), every=64)
CFG = train.Config()
MATMUL, STEP = "Matrix products of a block", "Training step"
SHOWN = ("ms", "ratio", "GFLOP", "GFLOP/s", "of_matmul", "launches", "note")

# -- counting --------------------------------------------------------------------------------------

def count_flops(act):
    """FLOPs of one call."""
    # The counter knows fused attention on GPUs only, so attention is taken apart for it.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        act()
    return counter.get_total_flops()

class LaunchCounter(TorchDispatchMode):
    """Counts the aten operations that would launch a kernel on a GPU, one for each operation.

    Views only change sizes and strides, and an empty tensor is not filled. A foreach or fused
    operation counts once, however many tensors it takes.
    """
    WITHOUT_KERNEL = ("empty", "new_empty", "_unsafe_view", "sym_", "is_", "_local_scalar_dense")

    def __init__(self):
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        silent = func.is_view or name.startswith(self.WITHOUT_KERNEL)
        if namespace == "aten" and not silent:
            self.launches += 1
        return func(*args, **(kwargs or {}))

def count_launches(act):
    """Kernels of one call. The first call of an optimizer also makes its state: warm up before."""
    with LaunchCounter() as counter:
        act()
    return counter.launches

# -- measuring -------------------------------------------------------------------------------------

class Lab:
    """What the parts share: flags, sizes, device, corpus and a clock."""

    def __init__(self, flags):
        self.flags = flags
        self.size = FAST if flags.fast else FULL
        self.ends = self.size.widths[0], self.size.widths[-1]
        self.device, bf16 = train.pick_device(CFG)
        self.dtypes = dict(fp32=None, bf16=bf16) if bf16 else dict(fp32=None)
        self.limits = {}                # (width, dtype) -> FLOP/s of bare matrix products
        self.corpus = data.load(CFG)
        # The longest question and the longest answer fix all padding.
        qa = sorted(self.corpus.qa, key=lambda row: len(row.answer))
        some = [max(qa, key=lambda row: len(row.question)), *qa[::-self.size.every]]
        self.questions = data.Questions(some, self.corpus.tokenizer, CFG.block_size,
                                        CFG.answer_size, self.device)

    def time(self, act):
        """Milliseconds of one call; a GPU is waited for."""
        started = time.perf_counter()
        act()
        getattr(torch, self.device).synchronize()
        return 1e3 * (time.perf_counter() - started)

    def measure(self, part, acts, calls, width, notes={}, tokens=1):
        """Time functions in turn; append their figures to the results file.

        acts: (name, dtype) -> function. notes: the same -> text. tokens: launches are stored per
        so many generated tokens.
        """
        gflop = [count_flops(act) / 1e9 for act in acts.values()]       # warms up, too
        launches = [count_launches(act) / tokens for act in acts.values()]
        times = [[self.time(act) for act in acts.values()] for _ in range(calls)]
        medians = np.median(times, axis=0)
        for arm, work, kernels, ms in zip(acts, gflop, launches, medians):
            name, dtype = arm
            rate = work / ms * 1e3
            if part == MATMUL:
                self.limits[width, dtype] = rate
            figures = {"ms": ms, "ratio": ms / medians[0], "GFLOP": work, "GFLOP/s": rate,
                       "of_matmul": rate / self.limits.get((width, dtype), np.inf),
                       "launches": kernels, "note": notes.get(arm)}
            self.store(f"{part}: {name}, width {width}, {dtype}", figures)

    def store(self, arm, figures):
        """Append the figures of an arm, numbers with three digits at least."""
        shared = dict(arm=arm, seed="", deviation="", seeds=1, commit=arms.commit(),
                      device=arms.machine())
        rows = []
        for name, value in figures.items():
            if value:
                text = value if name == "note" else f"{value:{'.0f' if value >= 100 else '.3g'}}"
                rows.append(shared | dict(figure=name, value=text))
        records.append(records.file_of("speed", self.flags), rows)
        print(f"{arm}: ran" if self.flags.fast else f"{arm}: {figures['ms']:.3g} ms", flush=True)

# -- what is measured ------------------------------------------------------------------------------

def shape(width):
    """The fields of a Config that follow from the width: heads of 32, a predictor as wide."""
    return dict(n_embd=width, n_head=width // 32, pred_embd=width)

def gpt_of(width, depth=CFG.n_layer, size=CFG.block_size):
    """The control, of our blocks. size: the most tokens that it reads."""
    cfg = tjepa.Config(**shape(width), vocab_size=CFG.vocab_size, n_layer=depth, top_k=1)
    return GPT(cfg, size)

def nanogpt(lab, width, size=CFG.block_size):
    """nanoGPT in the shape of the encoder, and its optimizer. Nothing of it is part of this
    repository: its model.py is imported from where it is."""
    path = Path(lab.flags.nanogpt, "model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = module.GPTConfig(size, CFG.vocab_size, CFG.n_layer, width // 32, width, 0.0, bias=False)
    with redirect_stdout(None):         # it prints its number of parameters
        model = module.GPT(shape).to(lab.device)
        # "cuda" makes AdamW fused, as ours is on every device
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cuda")
    return model, optimizer

def training_step(run, phase, loss_at, optimizer=None):
    """A function that takes one training step, by the statements of `train.fit`."""
    optimizer = optimizer or train.make_optimizer(run, phase)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step():
        """Forward, backward, clip, AdamW, EMA."""
        with run.autocast():
            loss, stats = loss_at(0.5)
        (loss / run.cfg.accum).backward()
        torch.nn.utils.clip_grad_norm_(parameters, run.cfg.clip)
        optimizer.step()
        optimizer.zero_grad()
        if train.target_moves(run.cfg, phase):
            run.model.ema_update()
    return step

def gpt_step(lab, model, optimizer=None, dtype=None):
    """The training step of a GPT, ours or nanoGPT's, on as many tokens as phase 1 reads."""
    tokenizer = lab.corpus.tokenizer
    text = data.Text(lab.corpus.train.tokens, CFG.block_size + 1, tokenizer, "the shipped text")

    def loss_at(progress):
        """Cross-entropy of random rows of text."""
        rows = text.batch(lab.size.rows).to(lab.device, non_blocking=True)      # (B, T+1)
        targets = rows[:, 1:].masked_fill(rows[:, 1:] == text.pad, -1).contiguous()
        return model(rows[:, :-1], targets)[1], {}
    run = train.Run(CFG, model, lab.corpus, lab.device, dtype)
    return training_step(run, "speak", loss_at, optimizer)

def phase_step(lab, phase, dtype, width):
    """The training step of a phase of train.py, with fresh weights."""
    cfg = dataclasses.replace(CFG, batch_size=lab.size.rows, **shape(width))
    model = train.build(cfg, lab.corpus.tokenizer).to(lab.device)
    run = train.Run(cfg, model, lab.corpus, lab.device, dtype, lab.questions)
    if phase != "pretrain":
        run = run._replace(concepts=train.set_answers(run, None))
    loss_at, _ = train.PHASE_OF[phase](run)
    return training_step(run, phase, loss_at)

def products(lab, width, dtype):
    """The four bare matrix products of a block, for the tokens of a step."""
    n = lab.size.rows * CFG.block_size
    made = []
    for n_in, n_out in ((1, 3), (1, 1), (1, 4), (4, 1)):
        x = torch.randn(n, width * n_in, device=lab.device, dtype=dtype)
        weight = torch.randn(width * n_out, width * n_in, device=lab.device, dtype=dtype)
        made.append((x, weight))
    return lambda: [F.linear(x, weight) for x, weight in made]

def steps(lab):
    """The bare products first, which are the limit; then nanoGPT, our GPT and the three phases."""
    for width in lab.size.widths:
        bare = {("C-3C, C-C, C-4C, 4C-C", name): products(lab, width, dtype)
                for name, dtype in dict(fp32=torch.float32, bf16=torch.bfloat16).items()}
        lab.measure(MATMUL, bare, lab.size.calls, width)
        acts = {}
        if lab.flags.nanogpt:
            acts["nanoGPT", "fp32"] = gpt_step(lab, *nanogpt(lab, width))
        for name, dtype in lab.dtypes.items():
            gpt = gpt_of(width).to(lab.device)
            acts["GPT of our blocks", name] = gpt_step(lab, gpt, dtype=dtype)
            for number, phase in enumerate(train.PHASES, 1):
                acts[f"phase {number}, {phase}", name] = phase_step(lab, phase, dtype, width)
        lab.measure(STEP, acts, lab.size.calls, width)

def endless(lab, width, size):
    """An untrained model in which no token ends an answer: it says `size` tokens."""
    cfg = tjepa.Config(**shape(width), vocab_size=CFG.vocab_size, answer_size=size)
    cfg.eos = -1
    return tjepa.TJEPA(cfg, lab.corpus.tokenizer.word_start).to(lab.device)

@torch.no_grad()
def generation(lab):
    """256 tokens, one text at a time: nanoGPT without a cache, ours with a KV cache."""
    n = lab.size.said
    for width in lab.ends:
        model, gpt = endless(lab, width, n), gpt_of(width, size=n + 1).to(lab.device)
        nothing = torch.zeros(1, 0, device=lab.device)
        thought = tjepa.Thought(torch.randn(1, width, device=lab.device), nothing, nothing)
        start = torch.zeros(1, 1, dtype=torch.long, device=lab.device)

        def speak(dtype):
            """As sample.py does, at temperature 1."""
            with torch.autocast(lab.device, dtype, enabled=dtype is not None):
                list(model.speak(thought, temperature=1.0))
        acts = {}
        if lab.flags.nanogpt:
            acts["nanoGPT's generate", "fp32"] = partial(nanogpt(lab, width, n)[0].generate, start, n)
        acts["GPT of our blocks, KV cache", "fp32"] = partial(gpt.generate, start, n)
        for name, dtype in lab.dtypes.items():
            acts["decoder, KV cache", name] = partial(speak, dtype)
        part = f"Saying {n} tokens, 1 at a time"
        lab.measure(part, acts, lab.size.said_calls, width, tokens=n)

@torch.no_grad()
def thinking(lab):
    """Think once, then say n tokens; against GPTs that read the question and say n tokens."""
    lengths = (lab.questions.tokens != lab.corpus.tokenizer.pad).sum(1)
    row = lengths.argsort()[len(lengths) // 2]                          # of middling length
    question = lab.questions.tokens[row:row + 1, :lengths[row]]         # (1, Q)
    for width, n in itertools.product(lab.ends, lab.size.answers):
        model = endless(lab, width, max(4, n))

        def ours():
            """One thought, n tokens."""
            return list(itertools.islice(model.speak(model.think(question)), n))

        def gpt(depth):
            """A GPT of some depth, as a function that says n tokens."""
            longest = question.size(1) + n
            return partial(gpt_of(width, depth, longest).to(lab.device).generate, question, n)
        # A GPT's parameters and FLOPs grow linearly with its depth.
        parts = model.context_encoder, model.predictor, model.decoder
        params = sum(p.numel() for part in parts for p in part.parameters())
        flops, one, two = map(count_flops, (ours, gpt(1), gpt(2)))
        of_block = (12 * width + 2) * width
        depths = {"parameters": (params - (CFG.vocab_size + 1) * width) / of_block,
                  "FLOPs": max(1, 1 + (flops - one) / (two - one))}
        acts, notes = {}, {}
        for name, depth in depths.items():
            arm = f"GPT of equal {name}", "fp32"
            acts[arm] = gpt(round(depth))
            notes[arm] = f"{round(depth)} layers"
        acts["T-JEPA", "fp32"] = ours
        part = f"Question of {question.size(1)} tokens, answer of {n}"
        lab.measure(part, acts, lab.size.calls, width, notes, tokens=n)

# -- the table -------------------------------------------------------------------------------------

def text_of(rows):
    """A markdown table for each part and device; an arm's newest measurement replaces older ones."""
    found = {}                          # (part, device) -> arm -> figures
    for row in rows:
        part, _, arm = row["arm"].partition(": ")
        arms_of_part = found.setdefault((part, row["device"]), {})
        if arms_of_part.get(arm, {}).get("commit") != row["commit"]:
            arms_of_part[arm] = dict(commit=row["commit"])
        arms_of_part[arm][row["figure"]] = row["value"]
    texts = []
    for (part, device), figures in found.items():
        if part.startswith((MATMUL, STEP, "Saying", "Question")):
            lines = [[arm, *(row.get(name, "") for name in SHOWN)] for arm, row in figures.items()]
            texts.append(f"{part}, on {device}:\n\n{markdown([['arm', *SHOWN], *lines])}")
    return "\n\n".join(texts)

def speed(flags):
    """Measure everything, then print the table."""
    takes = "a quarter of a minute on one core; its figures mean nothing"
    print(f"labs.speed: {takes if flags.fast else '15 minutes on 2 cores'}")
    torch.set_num_threads(flags.threads or torch.get_num_threads())
    lab = Lab(flags)
    for part in (steps, generation, thinking):
        part(lab)
    if not flags.fast:
        rows = records.read_rows(records.file_of("speed", flags))
        publish("speed", rows, text_of(rows), flags.table)


if __name__ == "__main__":
    arms.main(speed, Flags)
