"""How labs run and open a T-JEPA: an arm's Config, its run on disk, a quiet `train.fit`, speech."""
import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import torch

import data
import evaluate
import report
import tjepa
import train
from labs import variants

@dataclasses.dataclass
class Arm(train.Config):
    """An arm: the flags of train.py, and which variant of the model is trained.

    Most arms were measured when phase 1 minimised the squared error of each span's mean latent
    (MSE), and before phase 2 saw questions as people type them. They keep the settings of that
    time, which stand here; an arm with `NOW` has those of train.py.
    """
    variant: str = "TJEPA"  # a class of labs/variants.py, where only an experiment needs it
    target: str = "span"
    top_k: int = 4
    embed_scale: float = 1.0
    loss: str = "mse"
    pretrain_lr: float = 1e-3
    pred_layer: int = 2
    question_drop: float = 0.2
    question_noise: float = 0.0
    made_up: float = 0.0
    pretrain_steps: int = 800
    distill_steps: int = 700
    speak_steps: int = 500
    distill_lr: float = 5e-4
    qa_batch_size: int = 128
    eval_every: int = 200

NOW = {field.name: getattr(train.Config, field.name) for field in dataclasses.fields(train.Config)
       if field.default != getattr(Arm, field.name)}
# what phase 1 predicts, and from what
READING = {name: NOW[name]
           for name in ("target", "top_k", "embed_scale", "loss", "pretrain_lr")}
NO_TOKENS = dict(mlm=0.0, pred_embd=64)     # latents alone by MSE: half the width was measured

def corpus_from(documents, block_size, vocab_size, name):
    """Documents, a list of strings, as a `data.Corpus`; the last twentieth is held out.

    The tokenizer is trained on the first 3,000. name: what an error calls the text.
    """
    texts = [" " + text for text in documents]
    tokenizer = data.Tokenizer(data.train_bpe("\n".join(texts[:3000]), vocab_size - 4))
    rows = [row + [tokenizer.eos] for row in tokenizer.encode_batch(texts)]
    cut = len(rows) * 19 // 20
    parts = []
    for part, some in (("training", rows[:cut]), ("held-out", rows[cut:])):
        tokens = np.concatenate([np.array(row, dtype=np.uint16) for row in some])
        parts.append(data.Text(tokens, block_size, tokenizer, f"{name}, its {part} part"))
    fingerprint = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    return data.Corpus(tokenizer, *parts, qa=[], cloze=[], values={}, fingerprint=fingerprint)

def plain(cfg, **changes):
    """The train.Config in an arm's Config, with changes."""
    fields = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(train.Config)}
    return train.Config(**fields | changes)

def model_of(cfg):
    """The class of an arm's model."""
    return getattr(variants, getattr(cfg, "variant", "TJEPA"))

def train_arm(cfg, corpus=None, **changes):
    """Run the phases of an arm, as `train.run`: a dict of figures."""
    return train.run(plain(cfg, **changes), corpus, model_of(cfg))

def open_run(cfg, corpus=None, fresh=()):
    """The run in cfg.out as a `train.Run`, with questions and concepts as far as it has them.

    corpus: the one that cfg names, if it was read already or changed. fresh: as in `train.build`.
    """
    saved = train.load_checkpoint(cfg.out)
    made = plain(cfg, teacher_width=saved["config"]["teacher_width"])
    device, dtype = train.pick_device(made)
    corpus = corpus or data.load(made, data.Tokenizer.from_state(saved["tokenizer"]))
    model = train.build(made, corpus.tokenizer, saved["model"], fresh, model_of(cfg)).to(device)
    questions = concepts = None
    if corpus.qa:
        questions = data.Questions(
            corpus.qa, corpus.tokenizer, made.block_size, made.answer_size, device)
    if saved["concepts"] is not None:
        concepts = saved["concepts"].to(device)
    return train.Run(made, model, corpus, device, dtype, questions, concepts)

def shared_run(cfg, corpus, name, **changes):
    """A `train.Run` after phase 1, with changes, which arms with the same train.Config share.

    It is trained if the folder beside the arm's (`name` and a hash of what matters) is not there,
    or was stopped halfway.
    """
    wanted = plain(cfg, phase="pretrain", out=name, **changes)
    key = f"{wanted} {model_of(cfg)} {corpus.fingerprint}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    folder = Path(cfg.out).with_name(f"{name}_{digest}")
    out = dict(out=str(folder))
    saved = train.load_checkpoint(folder) if (folder / "ckpt.pt").exists() else dict(step=-1)
    if saved["step"] < wanted.pretrain_steps or not saved["evaluated"]:
        train.run(dataclasses.replace(wanted, **out), corpus, model_of(cfg))
    return open_run(dataclasses.replace(cfg, **out, **changes), corpus)

def fit(run, phase, loss_at, measure=None):
    """`train.fit` without checkpoints and curves: what it trains is measured afterwards."""
    Path(run.cfg.out).mkdir(parents=True, exist_ok=True)
    log = report.Log(run.cfg.out, [])
    train.fit(run, phase, loss_at, measure or (lambda whole: {}), log,
              save=lambda step, optimizer, evaluated: None)
    return log

def speak(run, latents):
    """What the decoder says of latents (n, C): a list of n strings."""
    return evaluate.say(run, tjepa.thought_of(latents))

def share_said(run, latents, wanted, texts):
    """The share of rows of latents (n, S, C) that are said without any error.

    wanted: numbers of texts (n, S), -1 in slots of which nothing is to be said.
    """
    used = wanted >= 0
    said = zip(speak(run, latents[used]), wanted[used].tolist())
    right = torch.ones_like(used)
    right[used] = torch.tensor([text == texts[i] for text, i in said])
    return right.all(1).float().mean().item()
