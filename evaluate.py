"""
What the figures mean: one definition each, in one place. And the picture that is drawn of them.

r2      1 - MSE(prediction, target) / MSE(mean target, target): 0 knows the average only
hit1    share of predicted span latents whose nearest target in the batch is their own; chance stands beside it
cloze   share of held-out statements whose own answer has the lowest energy among those that the text names; _all: among
        all values that its relation takes in facts.tsv
r1, mrr rank of the answer's latent, seen from the thought, among the answers of its relation
em      exact match of greedy speech, over-generation counts as wrong
std, rank, cos, pos are `tjepa.latent_health`; auroc, abstain and threshold are in `abstention`.
"""
import csv
from pathlib import Path

import torch

import tjepa

SPLITS = ("DEC", "LAT", "TXT")


@torch.no_grad()
def evaluate_text(run, rows=256):
    """Phase 1 on held-out text: r2, hit1 and its chance, and the collapse panel of the target's token latents."""
    model = run.model
    torch.manual_seed(0)                                                # the same rows and spans at every evaluation
    tokens = run.corpus.val.batch(rows).to(run.device)
    spans = tjepa.sample_spans(tokens, model.word_start, model.cfg)
    found, latents = model.predict(tokens, spans), model.encode(tokens)     # no autocast: bf16 would round the figures
    predicted, target = found.spans[found.weight], found.target[found.weight]                       # (n, C)
    p, t = predicted[:2000], target[:2000]
    own = torch.arange(len(p), device=run.device)
    health = tjepa.latent_health(latents, tokens != model.cfg.pad)
    r2, hits = tjepa.r_squared(predicted, target, torch.ones_like(target[:, 0])), torch.cdist(p, t).argmin(1) == own
    return dict(val_r2=r2.item(), hit1=hits.float().mean().item(), chance=1 / len(t), health=tjepa.health_word(health),
                **health)

@torch.no_grad()
def gap_energy(run, tokenizer, before, values, after, size=512):
    """Energy of each value (n strings) in the gap between before and after: (n,). Low fits."""
    encode, block_size = tokenizer.encode, run.cfg.block_size
    # as in a text: a space in front, and a blank before the gap belongs to the value
    left, right = encode(" " + before.rstrip()) if before else [], encode(after)
    middles = [encode(value if before[-1:].strip() else " " + value) for value in values]
    longest = max(middles, key=len)
    width = len(left + longest + right)     # a shorter value leaves padding, which fills the slots that it lacks
    if width > block_size:
        raise ValueError(f"the text has {width} tokens with '{values[middles.index(longest)]}' in the gap, above the "
                         f"run's block_size={block_size}: shorten it")
    tokens = torch.full((len(values), width), tokenizer.pad)                                        # (n, T)
    spans = torch.full_like(tokens, run.model.cfg.max_spans)                                        # (n, T)
    for row, middle in enumerate(middles):
        tokens[row, :len(left + middle + right)] = torch.tensor(left + middle + right)
        spans[row, len(left):len(left + middle)] = 0
    # no autocast: in bf16 energies would tie
    return torch.cat([run.model.energy(some, where) for some, where in
                      zip(tokens.to(run.device).split(size), spans.to(run.device).split(size))])

def cloze(run, relation):
    """Share of a relation's held-out statements whose own answer has the lowest energy, and its chance: among the
    answers that the text names, and (_all) among all of facts.tsv, most of which the text of a small run never names.
    """
    items = [item for item in run.corpus.cloze if item.relation == relation]
    known = sorted({item.answer for item in items})
    values, right, right_all = known + sorted(set(run.corpus.values[relation]) - set(known)), [], []
    for item in items:
        before, after = item.statement.split("{a}")
        energy = gap_energy(run, run.corpus.tokenizer, before, values, after)
        right.append(values[energy[:len(known)].argmin().item()] == item.answer)
        right_all.append(values[energy.argmin().item()] == item.answer)
    return {f"cloze_{relation}": sum(right) / len(right), f"cloze_{relation}_chance": 1 / len(known),
            f"cloze_{relation}_all": sum(right_all) / len(right), f"cloze_{relation}_all_chance": 1 / len(values)}

@torch.no_grad()
def think_all(run, tokens, size=1024):
    """The thoughts of many questions (n, T), in batches: a `Thought` of n rows; no token latents if none are read."""
    parts = []
    for some in tokens.split(size):
        with run.autocast():
            thought = run.model.think(some)
        kept = 0 if run.cfg.memory == "thought" else some.size(1)
        parts.append(tjepa.Thought(thought.latent.float(), thought.context[:, :kept].float(), thought.real[:, :kept]))
    return tjepa.Thought(*map(torch.cat, zip(*parts)))

def standardise(model, latents):
    """A teacher's latents (n, D) in the units that thoughts have."""
    return (latents - model.concept_mean) / model.concept_std

def by_split(questions, name, score):
    """Means of a score (n,) by split and phrasing: name_DEC, name_DEC_heldout, ..."""
    found = {}
    for split in SPLITS:
        for phrasing, tail in ("trained", ""), ("heldout", "_heldout"):
            if len(which := questions.where(split, phrasing=phrasing)):
                found[f"{name}_{split}{tail}"] = score[which].float().mean().item()
    return found

def recall(run, questions, table):
    """R@1 and MRR of the thought among the answers of its relation, by split and phrasing; and `abstention`."""
    thoughts = think_all(run, questions.tokens)
    distance = torch.cdist(thoughts.latent, table)                                                  # (n, A)
    rivals = distance.masked_fill(~questions.rivals, torch.inf)
    # a tie is lost: else latents that all fell to one point would be right always
    rank = (rivals <= rivals.gather(1, questions.answer_of[:, None])).sum(1)                        # (n,)
    return (by_split(questions, "r1", rank == 1) | by_split(questions, "mrr", 1 / rank)
            | abstention(questions, distance.amin(1)))

def abstention(questions, distance):
    """Distance of the thought to the nearest known concept, (n,), as a sign of not knowing.

    threshold keeps 95 % of the DEC questions in held-out phrasing (all, if there is only one phrasing, with a margin:
    alone, or in bf16, the same question's distance is rounded otherwise than in a batch); abstain is the
    share of NEVER questions beyond it; auroc is the chance that a NEVER question lies farther away than such a DEC one.
    """
    phrasing = "heldout" if len(questions.where("DEC", phrasing="heldout")) else "trained"
    known = distance[questions.where("DEC", phrasing=phrasing)]
    found = dict(threshold=(known.quantile(0.95) if phrasing == "heldout" else 1.05 * known.amax()).item())
    if len(never := questions.where("NEVER", phrasing=phrasing)):
        found["abstain"] = (distance[never] > found["threshold"]).float().mean().item()
        found["auroc"] = (distance[never][:, None] > known).float().mean().item()
    return found

def say(run, thoughts, size=512):
    """Greedy speech for a `Thought` of n rows: a list of n strings."""
    said = []
    for some in torch.arange(len(thoughts.latent), device=run.device).split(size):
        with run.autocast():
            ids = torch.stack(list(run.model.speak(thoughts.pick(some))), dim=1)                    # (n, L)
        said += [run.corpus.tokenizer.decode(row).strip() for row in ids.tolist()]
    return said

def exact_match(run, questions, thoughts):
    """EM by split and phrasing; and over DEC and LAT with each thought replaced by that of another question."""
    def matches(thoughts):
        """Which answers are said right: bool (n,)."""
        said = say(run, thoughts)
        return torch.tensor([words == row.answer for words, row in zip(said, questions.rows)], device=run.device)
    torch.manual_seed(0)
    shuffled = matches(thoughts.pick(torch.randperm(len(questions.rows), device=run.device)))
    return (by_split(questions, "em", matches(thoughts))
            | dict(em_shuffled=shuffled[questions.where("DEC", "LAT")].float().mean().item()))

@torch.no_grad()
def transcript(run, questions, table, threshold):
    """A question of each of DEC, LAT and NEVER, in a phrasing never trained on if there is one: lines to print."""
    notes = dict(DEC="taught in latent space and as tokens",
                 LAT="taught in latent space, never shown to the decoder as tokens",
                 NEVER="its subject is invented, nothing knows it")
    lines, questions = [], questions.only("heldout")
    for split, note in notes.items():
        if not len(which := questions.where(split)[:1]):
            continue
        thought = think_all(run, questions.tokens[which])
        distance = torch.cdist(thought.latent, table).min().item()
        answer = say(run, thought)[0] if distance <= threshold else "I don't know"
        lines += [f"{split} ({note})", f"  > {questions.rows[which].question}",
                  f"  {answer}   (nearest concept at {distance:.1f}, threshold {threshold:.1f})"]
    return lines

def summary(figures):
    """The figures of a run as lines to print; what was not measured is left out."""
    lines = []
    if "val_r2" in figures:
        share = figures["rank"] / figures["bound"]
        lines.append("pretrain: R2 {val_r2:.2f} on held-out text, rank {rank:.0f} of {bound} (share {share:.2f}), "
                     "{health}".format(share=share, **figures))
    if "cloze_capital" in figures:
        lines[-1] += (", capital by lowest energy {cloze_capital:.2f} (chance {cloze_capital_chance:.3f}), among all "
                      "of the world {cloze_capital_all:.2f} ({cloze_capital_all_chance:.3f})").format(**figures)
    for name, title in ("r1", "distill: R@1 of the thought"), ("em", "speak: exact match"):
        cells = [f"{split} {figures[f'{name}_{split}']:.3f}" + (
            f" / {figures[f'{name}_{split}_heldout']:.3f}" if f"{name}_{split}_heldout" in figures else "")
                 for split in SPLITS if f"{name}_{split}" in figures]
        if cells:
            lines.append(f"{title}, trained / held-out phrasing: {', '.join(cells)}")
    if "em_shuffled" in figures:
        lines.append(f"  with the memory shuffled: {figures['em_shuffled']:.3f}")
    if "auroc" in figures:
        lines.append(f"  NEVER: {figures['abstain']:.2f} answered \"I don't know\", AUROC {figures['auroc']:.2f}")
    return lines

class Log:
    """metrics.csv, one row a log step. A resumed run cuts the file back to the rows of its checkpoint and goes on.
    tokens and tok_s count tokens of text in phase 1, questions in phases 2 and 3."""
    COLUMNS = [*("phase step tokens loss latent sigreg vicreg mlm token r2 lr tau alpha grad tok_s "
                 "val_r2 std rank bound cos cos_centred pos hit1 chance health").split(),
               *(f"cloze_capital{tail}" for tail in ("", "_chance", "_all", "_all_chance")),
               *(f"{name}_{split}{tail}" for name in ("r1", "mrr", "em") for split in SPLITS
                 for tail in ("", "_heldout")), "em_shuffled", "threshold", "abstain", "auroc"]

    def __init__(self, out, rows):
        self.path, self.rows = Path(out) / "metrics.csv", []
        self.path.write_text(",".join(self.COLUMNS) + "\n")
        for row in rows:
            self.write(row)

    def write(self, row):
        """Append one row."""
        self.rows.append(row)
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS, lineterminator="\n")
            writer.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()})

    def last(self):
        """The newest value of each column: what a run returns."""
        return {name: value for row in self.rows for name, value in row.items()}

def draw_curves(rows, phases, path):
    """curves.png from the rows of metrics.csv: six panels over steps, the phases one after the other."""
    import matplotlib               # here and not above: --help should not wait for it
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    begin, total = {}, 0
    for phase in phases:
        begin[phase], total = total, total + max((row["step"] for row in rows if row["phase"] == phase), default=0)
    panels = {"losses of the phases": ("latent", "mlm", "token", "sigreg"),
              "R2: 0 knows the average only": ("r2", "val_r2"),
              "std across sequences": ("std",), "rank of the target, and its bound": ("rank", "bound"),
              "hit rate of spans, R@1 of answers": ("hit1", "chance", "r1_DEC_heldout", "r1_LAT_heldout"),
              "exact match": ("em_DEC", "em_DEC_heldout", "em_LAT", "em_LAT_heldout", "em_TXT_heldout")}
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5))
    figure.subplots_adjust(0.04, 0.08, 0.99, 0.95, 0.15, 0.35)          # a layout engine would draw it all twice
    for axis, (title, names) in zip(axes.flat, panels.items()):
        for name in names:
            at = [(row["step"] + begin[row["phase"]], row[name]) for row in rows if name in row]
            if at:
                axis.plot(*zip(*at), label=name, marker="." if len(at) < 20 else "", linewidth=1)
                axis.legend(fontsize=7)
        for phase in phases[1:]:
            axis.axvline(begin[phase], color="0.8", zorder=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(f"step ({', then '.join(phases)})", fontsize=8)
    axes[0, 0].set_yscale("log")
    axes[0, 1].set_ylim(-0.2, 1)
    figure.savefig(path.with_suffix(".part.png"), dpi=110)
    plt.close(figure)
    path.with_suffix(".part.png").replace(path)
