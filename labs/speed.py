"""
How fast is a training step, how fast could this machine be, and what would a GPT cost?

    python -m labs.speed --nanogpt=../nanoGPT   15 minutes on 2 cores; run nothing else meanwhile
    python -m labs.speed --fast                 a minute of a core: does it run?

Expected before the first run: by FLOPs phase 1 costs as much as a GPT's step (counted since, by
MSE: .91 / .99 / 1.04 of it at width 128 / 256 / 512). To think once saves time in long answers
only. Arms are called in turn, A B C A B C ..., so that a busy moment of the machine hits all.

    ms          median over 20 calls after a warm-up (3 calls for 256 tokens)
    ratio       ms over those of the first arm of the same width
    GFLOP       by torch.utils.flop_counter: 2 per multiply-add of each matrix product, forward and
                backward; causal attention counts as a full square
    of_matmul   FLOP/s over those of the four bare matrix products of a block
    launches    kernels that a GPU would launch, of a step or of one generated token; of a compiled
                step those that its graphs launch on a CPU (AdamW and a division are outside)
"""
import dataclasses
import importlib.util
import itertools
import re
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code
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
    bf16: bool = False          # bf16 autocast instead of fp32
    out: str = "out/labs"       # folder of speed-fast.csv
    results: str = "labs/results"   # folder of speed.csv, relative to the repository
    fast: bool = False          # a few calls of everything, to see that it runs
    table: str = ""             # also write the table into this file, between its markers

# rows of text a step; tokens to generate; lengths of an answer; questions: each so-manieth
FULL = SimpleNamespace(widths=(128, 256, 512), rows=48, calls=20, said=256, said_calls=3,
                       answers=(1, 4, 16, 64), every=16)
FAST = SimpleNamespace(widths=(32, 64), rows=4, calls=2, said=8, said_calls=1,
                       answers=(1, 4), every=64)
CFG = train.Config()
MATMUL = "Matrix products of a block"
SHOWN = ("ms", "ratio", "GFLOP", "GFLOP/s", "of_matmul", "launches", "note")

def count_flops(act):
    """FLOPs of one call."""
    # The counter knows fused attention on GPUs only, so attention is taken apart for it.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        act()
    return counter.get_total_flops()

class LaunchCounter(TorchDispatchMode):
    """Counts the aten operations that would launch a kernel on a GPU.

    Views only change sizes and strides, and an empty tensor is not filled. A foreach or fused
    operation counts once, however many tensors it takes.
    """
    SILENT = ("empty", "new_empty", "_unsafe_view", "sym_", "is_", "_local_scalar_dense")
    launches = 0
    drawing = False                     # batches are drawn on the CPU, whatever the device is

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        silent = self.drawing or func.is_view or name.startswith(self.SILENT)
        if namespace == "aten" and not silent:
            self.launches += 1
        return func(*args, **(kwargs or {}))

def count_launches(act):
    """Kernels of one call. The first call of an optimizer makes its state: warm up before."""
    with LaunchCounter() as counter:
        act()
    return counter.launches

# what the compiler's code calls on a CPU: its own kernels, and those of libraries
CALL = r"^ *(?:\w+ = )?(?:cpp_fused\w*\(|extern_kernels\.|torch\.ops\.aten\.)(\w*)"
VIEWS = ("unsqueeze", "view_as_real")

def compiled_launches(act):
    """Kernels in the graphs that the first call of act compiles for a CPU."""
    with inductor.patch(force_disable_caches=True):
        _, codes = run_and_get_code(act)
    called = [name for code in codes
              for name in re.findall(CALL, code.partition("def call(")[2], re.M)]
    return sum(name not in VIEWS for name in called)

class Run(train.Run):
    """A `train.Run` whose batches are drawn uncounted."""

    def in_parts(self, draw):
        """As `train.Run.in_parts`."""
        def uncounted():
            """Draw a batch; its launches do not count."""
            LaunchCounter.drawing = True
            batch = draw()
            LaunchCounter.drawing = False
            return batch
        return super().in_parts(uncounted)

class Lab:
    """What the parts share: flags, sizes, device, corpus and a clock."""

    def __init__(self, flags):
        self.flags = flags
        self.size = FAST if flags.fast else FULL
        self.ends = self.size.widths[0], self.size.widths[-1]
        self.device, _ = train.pick_device(CFG)
        self.dtype = torch.bfloat16 if flags.bf16 else None
        self.limits = {}                # width -> FLOP/s of bare products
        self.corpus = data.load(CFG)
        # The longest question and the longest answer are there: they fix all padding.
        qa = sorted(self.corpus.qa, key=lambda row: len(row.answer))
        some = [max(qa, key=lambda row: len(row.question)), *qa[::-self.size.every]]
        self.questions = data.Questions(some, self.corpus.tokenizer, CFG.block_size,
                                        CFG.answer_size, self.device)

    def run(self, model, cfg=CFG):
        """A `train.Run` with a model."""
        model = model.to(self.device)
        return Run(cfg, model, self.corpus, self.device, self.dtype, self.questions)

    def time(self, act):
        """Milliseconds of one call; a GPU is waited for."""
        started = time.perf_counter()
        act()
        getattr(torch, self.device).synchronize()
        return 1e3 * (time.perf_counter() - started)

    def measure(self, part, acts, calls, width, notes={}, tokens=1):
        """Time functions in turn, a dict of name -> function, and append their figures.

        notes: name -> text. tokens: how many a call generates.
        """
        gflop = [count_flops(act) / 1e9 for act in acts.values()]       # warms up, too
        launches = [count_launches(act) / tokens for act in acts.values()]
        times = [[self.time(act) for act in acts.values()] for _ in range(calls)]
        medians = np.median(times, axis=0)
        for name, work, kernels, ms in zip(acts, gflop, launches, medians):
            rate = work / ms * 1e3
            if part == MATMUL:
                self.limits[width] = rate
            figures = {"ms": ms, "ratio": ms / medians[0], "GFLOP": work, "GFLOP/s": rate,
                       "of_matmul": rate / self.limits.get(width, np.inf), "launches": kernels}
            self.keep(f"{part}: {name}", width, figures, notes.get(name))

    def keep(self, arm, width, figures, note=None):
        """Append the figures of an arm, a dict of numbers, and print them."""
        texts = {figure: f"{x:.0f}" if x >= 100 else f"{x:.3g}"
                 for figure, x in figures.items() if x}
        if note:
            texts["note"] = note
        arm = f"{arm}, width {width}, {'bf16' if self.dtype else 'fp32'}"
        shared = dict(arm=arm, seeds=1, commit=arms.commit(), device=arms.machine())
        rows = [shared | dict(figure=figure, value=text) for figure, text in texts.items()]
        records.append(records.file_of("speed", self.flags), rows)
        print(f"{arm}: ran" if self.flags.fast else f"{arm}: {texts}", flush=True)

# -- what is measured ------------------------------------------------------------------------------

def shape(width):
    """The fields of a Config that follow from the width: heads of 32, a predictor as wide."""
    return dict(n_embd=width, n_head=width // 32, pred_embd=width)

def gpt_of(width, depth=CFG.n_layer, size=CFG.block_size):
    """The control, of our blocks. size: the most tokens that it reads."""
    cfg = tjepa.Config(**shape(width), vocab_size=CFG.vocab_size, n_layer=depth, top_k=1)
    return GPT(cfg, size)

def nanogpt(lab, width, size=CFG.block_size):
    """nanoGPT in the shape of the encoder, and its optimizer, from its own model.py."""
    path = Path(lab.flags.nanogpt, "model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cfg = module.GPTConfig(size, CFG.vocab_size, CFG.n_layer, width // 32, width, 0.0, bias=False)
    model = module.GPT(cfg).to(lab.device)
    # "cuda" makes its AdamW fused, as ours is on every device
    return model, model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cuda")

def training_step(run, phase, loss_at, optimizer=None):
    """A function that takes one training step, by the statements of `train.fit`."""
    optimizer = optimizer or train.make_optimizer(run, phase)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    clip, ema_update = train.after_backward(run, phase)

    def step():
        """One training step."""
        with run.autocast():
            loss, stats = loss_at(0.5)
        (loss / run.cfg.accum).backward()
        clip(parameters, run.cfg.clip)
        optimizer.step()
        optimizer.zero_grad()
        if ema_update:
            ema_update()
    return step

def gpt_step(lab, model, optimizer=None):
    """The training step of a GPT, ours or nanoGPT's, on as many tokens as phase 1 reads."""
    tokenizer = lab.corpus.tokenizer
    text = data.Text(lab.corpus.train.tokens, CFG.block_size + 1, tokenizer, "the shipped text")
    run = lab.run(model)
    batches = run.in_parts(
        lambda: [text.batch(lab.size.rows).to(lab.device, non_blocking=True)])

    def loss_at(progress):
        """Loss of the next rows."""
        [rows] = next(batches)                                          # (B, T+1)
        targets = rows[:, 1:].masked_fill(rows[:, 1:] == text.pad, -1).contiguous()
        return model(rows[:, :-1], targets)[1], {}
    return training_step(run, "speak", loss_at, optimizer)

def phase_step(lab, phase, width, **changes):
    """The training step of a phase of train.py, with fresh weights; changes: of its Config."""
    cfg = dataclasses.replace(CFG, batch_size=lab.size.rows, **shape(width) | changes)
    run = lab.run(train.build(cfg, lab.corpus.tokenizer), cfg)
    if phase != "pretrain":
        run = run._replace(concepts=train.set_answers(run, None))
    return training_step(run, phase, train.PHASE_OF[phase](run)[0])

def products(lab, width):
    """The four bare matrix products of a block, for the tokens of a step."""
    n = lab.size.rows * CFG.block_size
    made = []
    for n_in, n_out in ((1, 3), (1, 1), (1, 4), (4, 1)):
        shapes = (n, width * n_in), (width * n_out, width * n_in)       # input, weight
        made.append([torch.randn(shape, device=lab.device, dtype=lab.dtype) for shape in shapes])
    return lambda: [F.linear(x, weight) for x, weight in made]

def steps(lab):
    """The bare products first, which are the limit; then nanoGPT, our GPT and the three phases."""
    for width in lab.size.widths:
        lab.measure(MATMUL, {"C-3C, C-C, C-4C, 4C-C": products(lab, width)}, lab.size.calls, width)
        acts = {}
        if lab.flags.nanogpt:
            acts["nanoGPT"] = gpt_step(lab, *nanogpt(lab, width))
        acts["GPT of our blocks"] = gpt_step(lab, gpt_of(width).to(lab.device))
        for number, phase in enumerate(train.PHASES, 1):
            acts[f"phase {number}, {phase}"] = phase_step(lab, phase, width)
        acts["phase 1, latents alone"] = phase_step(lab, "pretrain", width, mlm=0.0)
        lab.measure("Training step", acts, lab.size.calls, width)

def cheaper(lab):
    """A step of phase 1 with changes that save FLOPs, over the default."""
    width = lab.size.widths[0]
    acts = {"default": phase_step(lab, "pretrain", width)}
    for name, value in dict(pred_embd=width // 2, mask_ratio=0.5, loss="mse").items():
        acts[f"{name}={value}"] = phase_step(lab, "pretrain", width, **{name: value})
    lab.measure("Cheaper phase 1", acts, lab.size.calls, width)

def compiled(lab):
    """A step of phase 1 with --compile, over the same step without, on a CPU."""
    width = lab.size.widths[0]
    eager, graphs = (phase_step(lab, "pretrain", width, compile=on) for on in (False, True))
    eager()                                             # warms up
    launches = dict(eager=count_launches(eager), compiled=compiled_launches(graphs))
    times = [(lab.time(eager), lab.time(graphs)) for _ in range(lab.size.calls)]
    medians = np.median(times, axis=0)
    for name, ms in zip(launches, medians):
        figures = dict(ms=ms, ratio=ms / medians[0], launches=launches[name])
        lab.keep(f"Phase 1 with --compile: {name}", width, figures)

def endless(lab, width, size):
    """An untrained model in which no token ends an answer: it says `size` tokens."""
    cfg = tjepa.Config(**shape(width), vocab_size=CFG.vocab_size, answer_size=size)
    cfg.pad = cfg.vocab_size        # `TJEPA.speak` ends at the special tokens, which begin here
    return tjepa.TJEPA(cfg, lab.corpus.tokenizer.word_start).to(lab.device)

def generation(lab):
    """256 tokens, one text at a time: nanoGPT without a cache, ours with a KV cache."""
    n = lab.size.said
    for width in lab.ends:
        model, gpt = endless(lab, width, n), gpt_of(width, size=n + 1).to(lab.device)
        nothing = torch.zeros(1, 0, device=lab.device)
        thought = tjepa.Thought(torch.randn(1, width, device=lab.device), nothing, nothing)
        start = torch.zeros(1, 1, dtype=torch.long, device=lab.device)
        acts = {}
        if lab.flags.nanogpt:
            theirs, _ = nanogpt(lab, width, n)
            acts["nanoGPT's generate"] = partial(theirs.generate, start, n)
        acts["GPT of our blocks, KV cache"] = partial(gpt.generate, start, n)
        acts["decoder, KV cache"] = lambda: list(model.speak(thought, temperature=1.0))
        lab.measure(f"Saying {n} tokens, 1 at a time", acts, lab.size.said_calls, width, tokens=n)

def thinking(lab):
    """Think once, then say n tokens; against GPTs that read the question and say n tokens."""
    lengths = (lab.questions.tokens != lab.corpus.tokenizer.pad).sum(1)
    row = lengths.argsort()[len(lengths) // 2]                          # of middling length
    question = lab.questions.tokens[row:row + 1, :lengths[row]]         # (1, Q)
    for width, n in itertools.product(lab.ends, lab.size.answers):
        model = endless(lab, width, max(4, n))

        def ours():
            """Say n tokens by the decoder."""
            return list(itertools.islice(model.speak(model.think(question)), n))

        def gpt(depth):
            """A call that says n tokens by a GPT of this depth."""
            whole = gpt_of(width, depth, question.size(1) + n).to(lab.device)
            return partial(whole.generate, question, n)
        # A GPT's parameters and FLOPs grow linearly with its depth.
        parts = model.context_encoder, model.predictor, model.decoder
        params = sum(p.numel() for part in parts for p in part.parameters())
        outside = (CFG.vocab_size + 1) * width
        flops, one, two = map(count_flops, (ours, gpt(1), gpt(2)))
        depths = {"GPT of equal parameters": round((params - outside) / (12 * width + 2) / width),
                  "GPT of equal FLOPs": max(1, round(1 + (flops - one) / (two - one)))}
        acts = {name: gpt(depth) for name, depth in depths.items()} | {"T-JEPA": ours}
        notes = {name: f"{depth} layers" for name, depth in depths.items()}
        part = f"Question of {question.size(1)} tokens, answer of {n}"
        lab.measure(part, acts, lab.size.calls, width, notes, tokens=n)

def text_of(rows):
    """A markdown table for each part and device, of the newest measurement of each arm."""
    found = {}                          # (part, device) -> arm -> figures
    for row in rows:
        part, _, arm = row["arm"].partition(": ")
        of_part = found.setdefault((part, row["device"]), {})
        if of_part.get(arm, {}).get("commit") != row["commit"]:
            of_part[arm] = dict(commit=row["commit"])
        of_part[arm][row["figure"]] = row["value"]
    texts = []
    for (part, device), of_part in found.items():
        lines = [[arm, *(row.get(name, "") for name in SHOWN)] for arm, row in of_part.items()]
        texts.append(f"{part}, on {device}:\n\n{markdown([['arm', *SHOWN], *lines])}")
    return "\n\n".join(texts)

def speed(flags):
    """Measure everything, then print the table."""
    arms.folder_of("speed", flags)      # refuses --fast with --table
    print(f"labs.speed: {'a minute of a core' if flags.fast else '15 minutes on 2 cores'}")
    if flags.nanogpt and not Path(flags.nanogpt, "model.py").is_file():
        raise ValueError(f"--nanogpt={flags.nanogpt} is no checkout of nanoGPT: it has no model.py")
    lab = Lab(flags)
    steps(lab)
    cheaper(lab)
    if lab.device == "cpu" and not train.no_graphs():
        compiled(lab)
    with torch.no_grad(), lab.run(torch.nn.Identity()).autocast():
        generation(lab)
        thinking(lab)
    if not flags.fast:
        rows = records.read_rows(records.file_of("speed", flags))
        publish("speed", rows, text_of(rows), flags.table)

if __name__ == "__main__":
    arms.main(speed, Flags)
