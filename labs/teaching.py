"""
Facts that are added to a finished run: are they said in new wordings, and what do they cost?

    python -m labs.teaching             3 seeds; starts from the runs of `python -m labs.facts`
    python -m labs.teaching --fast      a few steps of each arm: does it run?

Expected before the first run: ten facts, each taught in one known wording, are said in nine others
nearly always; without replay the old facts are forgotten; without made-up subjects other invented
subjects get an answer, too.

    said            share of the new facts said in wordings that were not taught (held-out and
                    natural ones), within the threshold; said_known and said_new: answers that the
                    run knew, and answers it had never said
    updated         the same for two old facts that were contradicted
    lost_DEC, _LAT  exact match of old facts in held-out wordings, before minus after
    newly_answered  share of invented subjects that are answered now and were not before
"""
import dataclasses
import shutil
from pathlib import Path

import torch

import data
import evaluate
import train
from data.facts import prepare
from labs.arms import main, run_arms
from labs.facts import relabel
from labs.runs import fit, open_run, plain
from labs.tables import publish, tables

# relation, subject, taught wording, answer; no subject is in data/facts
KNOWN = (
    ("capital", "Lorvania", "What is the capital of Lorvania?", "Lima"),
    ("continent", "Ordavia", "Which continent is Ordavia in?", "Africa"),
    ("currency", "Belmora", "What is the currency of Belmora?", "euro"),
    ("language", "Kestria", "What is the official language of Kestria?", "Polish"),
    ("author", "The Glass Orchard", "Who wrote the book 'The Glass Orchard'?", "Jane Austen"),
)
NEVER_SAID = (
    ("capital", "Zintara", "What is the capital of Zintara?", "Port Mallow"),
    ("currency", "Quorland", "What is the currency of Quorland?", "silver drim"),
    ("inventor", "the moss clock", "Who invented the moss clock?", "Edda Brandt"),
    ("painter", "Harbour in Fog", "Who painted 'Harbour in Fog'?", "Tomas Ilvery"),
    ("composer", "The Tin Parade", "Who composed 'The Tin Parade'?", "Marga Ostrow"),
)
UPDATES = (
    ("capital", "France", "What is the capital of France?", "Lyon"),
    ("author", "Sapiens", "Who wrote the book 'Sapiens'?", "Ada Birk"),
)

@dataclasses.dataclass
class Config(train.Config):
    """An arm: flags of train.py, and what only this lab changes."""
    phase: str = "teach"
    replay: bool = True         # are old questions asked again?
    every: int = 1              # only every n-th old question, for --fast

ARMS = {
    "teach": Config(),
    "teach_steps=100": Config(teach_steps=100),
    "made_up=0": Config(made_up=0.0),
    "no replay": Config(replay=False),
}

def asked_about(facts):
    """Questions (`data.QA`) about facts in all held-out and natural wordings."""
    wordings = {}
    for relation, kind, template in prepare.read_tsv("templates.tsv"):
        if kind == "heldout":
            wordings.setdefault(relation, []).append(template)
    for relation, template in prepare.read_tsv("natural.tsv"):
        wordings.setdefault(relation, []).append(template)
    rows = []
    for relation, subject, _, answer in facts:
        for template in wordings[relation]:
            question = prepare.sentence(template, subject)
            rows.append(data.QA("NEW", "heldout", relation, subject, question, answer))
    return rows

def questions_of(run, rows):
    """Rows as `data.Questions` of a run."""
    cfg = run.cfg
    return data.Questions(rows, run.corpus.tokenizer, cfg.block_size, cfg.answer_size, run.device)

def answered(run, questions, threshold):
    """What is said (strings) and which thoughts are within the threshold, bool (n,)."""
    thoughts = evaluate.think_all(run, questions.tokens)
    distance = evaluate.concept_distance(run, thoughts.latent)
    return evaluate.say(run, thoughts), distance <= threshold

def share_said(run, facts, threshold):
    """Share of the questions about facts that are answered rightly, within the threshold."""
    questions = questions_of(run, asked_about(facts))
    said, known = answered(run, questions, threshold)
    right = [said == row.answer for said, row in zip(said, questions.rows)]
    return (torch.tensor(right) & known.cpu()).float().mean().item()

def old_figures(run, threshold):
    """Exact match of old facts in held-out wordings, and which invented subjects are answered."""
    old = run.questions.only("heldout")
    kept = [i for i, row in enumerate(old.rows)
            if (row.relation, row.subject) not in {fact[:2] for fact in UPDATES}]
    old = old.pick(torch.tensor(kept))
    said, known = answered(run, old, threshold)
    right = torch.tensor([text == row.answer for text, row in zip(said, old.rows)])
    em = {split: right[old.where(split).cpu()].float().mean().item() for split in ("DEC", "LAT")}
    return em, known[old.where("NEVER")]

def measure(cfg):
    """Add the facts to a copy of a finished run: a dict of figures."""
    out = Path(cfg.out)
    seed = out.name.rsplit("_", 1)[1]
    source = out.parent.parent / out.parent.name.replace("teaching", "facts") / f"default_{seed}"
    if not (source / "speak" / "ckpt.pt").is_file():
        raise ValueError(f"{source} is missing: run `python -m labs.facts --arms=default --redo` "
                         "first (with --results=FOLDER the published figures stay)")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shutil.copy(source / "speak" / "ckpt.pt", out)
    saved = train.load_checkpoint(out)
    # the run keeps its own flags; the arm's are those of teaching, and what it changes
    fields = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(train.Config)}
    changed = {name: value for name, value in fields.items()
               if name.startswith("teach_") or value != getattr(train.Config, name)}
    cfg = dataclasses.replace(cfg, **saved["config"] | changed)
    pairs = out / "new.tsv"
    lines = [f"{question}\t{answer}\n" for *_, question, answer in KNOWN + NEVER_SAID + UPDATES]
    pairs.write_text("".join(lines), encoding="utf-8")

    corpus = data.load(plain(cfg), data.Tokenizer.from_state(saved["tokenizer"]))
    corpus = corpus._replace(qa=corpus.qa[::cfg.every], cloze=corpus.cloze[::cfg.every])
    em_before, answered_before = old_figures(open_run(cfg, corpus), saved["threshold"])
    opened = train.open_run(plain(cfg, added=str(pairs)), corpus, train.tjepa.TJEPA)
    run = opened.run
    if not cfg.replay:
        hidden = relabel(run.questions, lambda row: row.split if row.split == "NEW" else "TXT")
        run = run._replace(questions=hidden)
    loss_at, _ = train.teach(run)
    fit(run, "teach", loss_at)
    run = opened.run
    threshold = evaluate.recall(run, run.questions, run.concepts)["threshold"]
    em, answered_now = old_figures(run, threshold)
    return dict(
        said=share_said(run, KNOWN + NEVER_SAID, threshold),
        said_known=share_said(run, KNOWN, threshold),
        said_new=share_said(run, NEVER_SAID, threshold),
        updated=share_said(run, UPDATES, threshold),
        lost_DEC=em_before["DEC"] - em["DEC"],
        lost_LAT=em_before["LAT"] - em["LAT"],
        newly_answered=(answered_now & ~answered_before).float().mean().item(),
        answered_before=answered_before.float().mean().item(),
    )

def teaching(flags):
    """Run the arms; print the table."""
    arms = ARMS
    if flags.fast:
        flags = dataclasses.replace(flags, seeds=1, redo=True)
        arms = {name: dataclasses.replace(cfg, teach_steps=2, every=40)
                for name, cfg in ARMS.items()}
        print("labs.teaching --fast: half a minute; it starts from `python -m labs.facts --fast`")
    rows = run_arms("teaching", arms, flags, measure)
    if not flags.fast:
        names = ("said", "said_known", "said_new", "updated", "lost_DEC", "lost_LAT",
                 "newly_answered")
        columns = {name: name for name in names}
        publish("teaching", rows, tables(rows, {"Ten facts added": (list(ARMS), columns)}),
                flags.table)

if __name__ == "__main__":
    main(teaching)
