"""
The models of the seeing lab: a text side that learns to speak, and eyes before it.

cfg is a `labs.seeing.Config`. Shapes: B pictures, P = 9 patches, T tokens of a question, S = 9
slots (a caption has one for each place, an answer slot 0), N sayable texts, W wordings, C width.
`speak` of labs/runs.py says a latent.
"""
import dataclasses
import functools
import os
import random
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

import data
import tjepa
import train
from data.scenes import prepare as world
from labs.measures import features
from labs.runs import corpus_from, fit, plain, shared_run, speak

PATCH = 16                              # pixels of a side: as large as a cell of the grid of places
S = len(world.PLACES)

# -- text ------------------------------------------------------------------------------------------

@functools.cache
def corpus_of(block_size, vocab_size, n):
    """The text of n scenes, and of facts, as a `data.Corpus`; the last twentieth is held out."""
    return corpus_from(world.documents(n), block_size, vocab_size, "data/scenes")

@functools.cache
def sayable():
    """All that a decoder is to say, text -> its wordings: sentences of captions, and answers."""
    found = {world.say(thing): [world.say(thing, wording) for wording in range(world.HELD_OUT)]
             for thing in world.EVERY}
    answers = [world.EMPTY, *(world.name(thing) for thing in world.EVERY), *world.COLOURS,
               *(f"a {shape}" for shape in world.SHAPES), *world.PLACES, *world.SIZES,
               *world.COUNTS, *world.COUNTRIES, *(answer for _, _, answer in world.facts())]
    return found | {answer: [answer] for answer in answers}

@functools.cache
def askable():
    """All questions about pictures, as (kind, words), -> their number."""
    both = [dict(c=c, h=h) for c in world.COLOURS for h in world.SHAPES]
    words = dict(
        caption=[{}], count=[{}], flag=[{}], what=[dict(p=p) for p in world.PLACES],
        colour=[dict(h=h) for h in world.SHAPES], shape=[dict(c=c) for c in world.COLOURS],
        place=both, size=both, relation=[one | dict(r=r) for one in both for r in world.RELATIONS])
    every = [(kind, tuple(one.items())) for kind in words for one in words[kind]]
    return {one: i for i, one in enumerate(every)}

class Words(NamedTuple):
    """What is said and what is asked, as tensors of one text side."""
    texts: list                 # N
    number: dict                # text -> its number
    latents: torch.Tensor       # (N, C) L_a: standardised, the mean over the trained wordings
    ids: torch.Tensor           # (N, A) tokens, with EOS and padding
    named: torch.Tensor         # bool (N,): is it in the text?
    questions: torch.Tensor     # (questions, W, T, C) token latents
    asked: torch.Tensor         # bool (questions, W, T): where a question has a token

@torch.no_grad()
def words_of(model, tokenizer, cfg):
    """`Words` of the frozen target encoder; latents are standardised over the named texts."""
    wordings = sayable()
    texts = list(wordings)
    flat = [" " + text for text in texts for text in wordings[text]]
    vectors = features(model, data.pack(tokenizer, flat, cfg.block_size, "--block_size"))
    counts = [len(wordings[text]) for text in texts]
    latents = torch.stack([part.mean(0) for part in vectors.split(counts)])         # (N, C)
    unheard = {world.say(thing) for thing in world.BY_KIND["unheard"]}
    named = torch.tensor([text not in unheard for text in texts])
    model.fit_answer_scale(latents[named])
    ids = data.pack_answers(tokenizer, texts, cfg.answer_size - 1, "--answer_size")
    asked = [world.ask(kind, dict(words), wording) for kind, words in askable()
             for wording in range(world.N_WORDINGS)]
    tokens = data.pack_questions(tokenizer, asked, cfg.block_size)
    tokens = tokens.unflatten(0, (-1, world.N_WORDINGS))                # (questions, W, T)
    return Words(
        texts=texts, number={text: i for i, text in enumerate(texts)},
        latents=model.standardise(latents), ids=train.with_end(ids, tokenizer), named=named,
        questions=model.encode(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2]),
        asked=tokens != tokenizer.pad)

def fact_questions(tokenizer, words, cfg, wordings):
    """Questions of text about countries: tokens (n, T), and the number of each answer (n,)."""
    asked, answers = [], []
    for country, relation, answer in world.facts():
        for wording in wordings:
            asked.append(world.fill(world.FACTS[relation][1][wording], s=country))
            answers.append(words.number[answer])
    return data.pack_questions(tokenizer, asked, cfg.block_size), torch.tensor(answers)

def teach_text(run, words, cfg):
    """Phases 2 and 3: thoughts of the questions about countries, then latent -> words by echoes."""
    model = run.model
    questions, answers = fact_questions(run.corpus.tokenizer, words, cfg, range(world.HELD_OUT))
    named = words.named.nonzero()[:, 0]

    def think_loss(progress):
        """Loss of the thoughts of random questions."""
        which = torch.randint(len(questions), (cfg.qa_batch_size,))
        return model.distill_loss(questions[which], words.latents[answers[which]])
    fit(run, "distill", think_loss)

    def echo_loss(progress):
        """Loss of the words of random echoes."""
        # half of the rows are answers: most of the texts are sentences of captions
        which = named[torch.randint(len(named), (cfg.qa_batch_size,))]
        short = named[len(world.NAMED):]
        which = torch.where(torch.rand(len(which)) < 0.5,
                            short[torch.randint(len(short), which.shape)], which)
        latent = words.latents[which]
        return model.speak_loss(tjepa.thought_of(latent), words.ids[which], latent, alpha=0.0)
    fit(run, "speak", echo_loss)

def open_text(cfg):
    """The text side after its three phases: (`train.Run`, `Words`). Arms of a seed share it."""
    corpus = corpus_of(cfg.block_size, cfg.vocab_size, cfg.documents)
    run = shared_run(cfg, corpus, "text")
    words = words_of(run.model, corpus.tokenizer, cfg)
    path = Path(run.cfg.out) / "speaks.pt"
    if path.exists():
        run.model.load_state_dict(torch.load(path, weights_only=True))
    else:
        teach_text(run, words, cfg)
        torch.save(run.model.state_dict(), path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
    return run._replace(cfg=plain(cfg), model=run.model.eval().requires_grad_(False)), words

# -- pictures and questions ------------------------------------------------------------------------

class Batch(NamedTuple):
    """Pictures with a question each."""
    pictures: torch.Tensor      # (B, SIZE, SIZE, 3)
    question: torch.Tensor      # (B,) number of a question
    wording: torch.Tensor       # (B,)
    answer: torch.Tensor        # (B, S) numbers of texts, -1 in slots that an answer does not need

def batch_of(words, pictures, asked, wordings, random_):
    """A `Batch` in random ones of wordings; asked: (kind, words, texts of the answer) of each."""
    question = [askable()[kind, tuple(some.items())] for kind, some, _ in asked]
    answer = [[words.number[text] for text in texts] + [-1] * (S - len(texts))
              for _, _, texts in asked]
    drawn = [random_.choice(wordings) for _ in asked]
    parts = (torch.tensor(part) for part in (question, drawn, answer))
    return Batch(torch.from_numpy(pictures), *parts)

def captions(words, scenes, rng, wordings=range(world.HELD_OUT), look=None, random_=random):
    """A `Batch` that asks for the caption of each scene; look: as in `world.render`."""
    asked = [("caption", {}, world.caption(scene)) for scene in scenes]
    return batch_of(words, world.render(scenes, rng, look), asked, wordings, random_)

def examples(words, n, random_, rng, what, kind="seen", wordings=range(world.HELD_OUT)):
    """A random `Batch` of n pictures; what: caption | question | flag. kind: as in
    `world.draw_scene`, of an object of each scene."""
    if what == "flag":
        countries = [random_.choice(world.COUNTRIES) for _ in range(n)]
        pictures = world.render_flags(countries, rng)
        asked = [("flag", {}, [country]) for country in countries]
        return batch_of(words, pictures, asked, wordings, random_)
    scenes = [world.draw_scene(random_, kind) for _ in range(n)]
    if what == "caption":
        return captions(words, scenes, rng, wordings, random_=random_)
    drawn = [world.draw_question(random_, scene) for scene in scenes]
    asked = [(kind, some, [answer]) for kind, some, answer in drawn]
    return batch_of(words, world.render(scenes, rng), asked, wordings, random_)

def lesson(words, n):
    """A training batch of n pictures: captions, questions and flags, 2 : 4 : 2."""
    seed = torch.randint(2 ** 62, ()).item()
    random_, rng = random.Random(seed), np.random.default_rng(seed)
    shares = dict(caption=n // 4, question=n - 2 * (n // 4), flag=n // 4)
    parts = [examples(words, share, random_, rng, what) for what, share in shares.items()]
    return Batch(*(torch.cat(one) for one in zip(*parts)))

# -- eyes ------------------------------------------------------------------------------------------

class PatchEncoder(nn.Module):
    """A small vision transformer, made of the blocks of tjepa.py; its positions are learned."""

    def __init__(self, cfg):
        super().__init__()
        self.patch_proj = nn.Linear(PATCH * PATCH * 4, cfg.n_embd)
        self.place_embed = nn.Parameter(torch.randn(S, cfg.n_embd) * 0.5)
        blocks = (tjepa.Block(cfg.n_embd, cfg.n_head) for _ in range(cfg.eye_layer))
        self.blocks = nn.ModuleList(blocks)
        # position 0 alone, which rotates by nothing
        self.register_buffer("rope", tjepa.rotary(1, cfg.n_embd // cfg.n_head), persistent=False)

    def forward(self, pictures):
        """pictures (B, SIZE, SIZE, 3) -> latents of the patches (B, P, C)."""
        # The largest of the three colours is a fourth channel: the outline, whatever its colour.
        pictures = torch.cat((pictures, pictures.amax(-1, keepdim=True)), dim=-1)
        patches = pictures.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # (B, 3, 3, 4, 16, 16)
        patches = patches.flatten(3).flatten(1, 2)                          # (B, P, 1024)
        # brightness of about .2 and its deviation of about .25 become 0 and 1
        x = self.patch_proj((patches - 0.2) / 0.25) + self.place_embed
        for block in self.blocks:
            x = block(x, self.rope)
        return tjepa.norm(x)

class EyePredictor(nn.Module):
    """Patch latents and a question's token latents -> the latents of the answer."""

    def __init__(self, cfg, longest):
        super().__init__()
        self.patch_proj = nn.Linear(cfg.n_embd, cfg.n_embd)
        self.question_proj = nn.Linear(cfg.n_embd, cfg.n_embd)
        self.token_embed = nn.Parameter(torch.randn(longest, cfg.n_embd) * 0.1)
        self.slot_embed = nn.Parameter(torch.randn(S, cfg.n_embd) * 0.5)
        blocks = (tjepa.Block(cfg.n_embd, cfg.n_head) for _ in range(cfg.pred_layer))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(cfg.n_embd)
        self.latent_proj = nn.Linear(cfg.n_embd, cfg.n_embd)
        # position 0 alone, which rotates by nothing
        self.register_buffer("rope", tjepa.rotary(1, cfg.n_embd // cfg.n_head), persistent=False)

    def forward(self, patches, question, asked):
        """patches (B, P, C), question (B, T, C) with mask (B, T) -> predicted latents (B, S, C)."""
        B, P, _ = patches.shape
        question = self.question_proj(question) + self.token_embed[:question.size(1)]
        slots = self.slot_embed.expand(B, -1, -1)
        x = torch.cat((self.patch_proj(patches), question, slots), dim=1)
        mask = tjepa.additive(F.pad(F.pad(asked, (P, 0), value=True), (0, S), value=True))
        for block in self.blocks[:-1]:
            x = block(x, self.rope, mask)
        x = self.blocks[-1](x, self.rope, mask, n_last=S)                   # only slots are read
        return self.latent_proj(self.norm(x))

class Seer(nn.Module):
    """Eyes and predictor before a text side. Its decoder is a part only to be frozen or tuned."""
    init_weights = tjepa.TJEPA.init_weights

    def __init__(self, cfg, jepa, words):
        super().__init__()
        self.cfg = jepa.cfg
        self.options = cfg
        self.eye = PatchEncoder(cfg)
        self.predictor = EyePredictor(cfg, words.questions.size(2))
        self.apply(self.init_weights)
        self.decoder = jepa.decoder

    def trained_in(self, phase):
        """Eyes and predictor; the decoder where the arm says so."""
        parts = [self.predictor]
        if self.options.eye in ("trained", "shuffled"):
            parts.append(self.eye)
        if self.options.decoder != "frozen":
            parts.append(self.decoder)
        return parts

    def see(self, pictures):
        """pictures (B, SIZE, SIZE, 3) -> patch latents (B, P, C); zeros for a blind arm."""
        patches = self.eye(pictures)
        return torch.zeros_like(patches) if self.options.eye == "blind" else patches

    def think(self, words, batch, patches=None):
        """Predicted latents of the answers of a `Batch`, (B, S, C)."""
        patches = self.see(batch.pictures) if patches is None else patches
        asked = words.asked[batch.question, batch.wording]              # (B, T)
        longest = int(asked.sum(1).max())
        question = words.questions[batch.question, batch.wording, :longest]
        return self.predictor(patches, question, asked[:, :longest])

def infonce(predicted, number, latents):
    """InfoNCE of predicted (n, C) among the different answers of a batch, number (n,) of texts.

    An answer that occurs twice is one candidate: it is not its own rival.
    """
    there, own = number.unique(return_inverse=True)
    similarity = F.normalize(predicted, dim=-1) @ F.normalize(latents[there], dim=-1).T
    return F.cross_entropy(similarity / 0.1, own)

def picture_loss(seer, jepa, words, cfg, batch):
    """Loss of a `Batch` -> (loss, stats): latents, and words where the decoder learns."""
    patches = seer.see(batch.pictures)
    predicted = seer.think(words, batch, patches)
    used = batch.answer >= 0                                            # (B, S)
    predicted, number = predicted[used], batch.answer[used]             # (n, C), (n,)
    target = words.latents[number]
    # seven places in ten are empty: together they weigh as much as two objects
    weight = torch.where(number == words.number[world.EMPTY], 0.25, 1.0)
    loss = 0.0
    if "mse" in cfg.distance:
        loss = loss + (weight * (predicted - target).square().mean(-1)).sum() / weight.sum()
    if "infonce" in cfg.distance:
        loss = loss + infonce(predicted, number, words.latents)
    stats = dict(latent=loss.detach())
    if cfg.eye_sigreg:
        flat = patches.flatten(0, 1)
        some = F.embedding(torch.randint(len(flat), (512,)), flat)
        loss = loss + cfg.eye_sigreg * jepa.sigreg(some)
    if cfg.decoder != "frozen":
        thought = tjepa.thought_of(predicted)
        token, _ = jepa.speak_loss(thought, words.ids[number], target, alpha=0.0)
        # the captioner learns from tokens alone
        loss = token if cfg.decoder == "fresh" else loss + token
    return loss, stats

def train_seer(run, words, cfg):
    """Learn pictures: (`Seer`, CPU seconds). The text side changes only where the arm says so."""
    jepa = run.model
    torch.manual_seed(cfg.seed)
    if cfg.decoder == "fresh":
        jepa.decoder = tjepa.Decoder(jepa.cfg)
        jepa.decoder.apply(jepa.init_weights)
    # noise is for latents that the decoder will not see again
    jepa.cfg = dataclasses.replace(jepa.cfg, noise=0.0)
    seer = Seer(cfg, jepa, words)

    def loss_at(progress):
        """Loss of a random lesson with pictures."""
        batch = lesson(words, cfg.qa_batch_size)
        if cfg.eye == "shuffled":
            batch = batch._replace(pictures=batch.pictures[torch.randperm(len(batch.pictures))])
        return picture_loss(seer, jepa, words, cfg, batch)
    started = time.process_time()
    settings = dict(distill_steps=cfg.picture_steps, distill_lr=cfg.picture_lr)
    fit(run._replace(model=seer, cfg=plain(cfg, **settings)), "distill", loss_at)
    return seer.eval(), time.process_time() - started
