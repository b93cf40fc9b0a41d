"""
Facts that are added to a finished run: are they said in new wordings, and what do they cost?

    python -m labs.teaching             3 seeds; starts from `python -m labs.facts --arms=default`
    python -m labs.teaching --fast      a few steps of each arm, after the same with --fast

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
from labs.facts import answered, fact_of, relabel
from labs.runs import fit, open_run, plain
from labs.tables import page_tables, publish

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
    wordings = [(relation, template) for relation, kind, template
                in prepare.read_tsv("templates.tsv") if kind == "heldout"]
    wordings += prepare.read_tsv("natural.tsv")
    sentence = prepare.sentence
    return [data.QA("NEW", "heldout", relation, subject, sentence(template, subject), answer)
            for relation, subject, _, answer in facts
            for of, template in wordings if of == relation]

def share_said(run, facts, threshold):
    """Share of the questions about facts that are answered rightly, within the threshold."""
    questions = data.Questions(asked_about(facts), run.corpus.tokenizer, run.cfg.block_size,
                               run.cfg.answer_size, run.device)
    right, known = answered(run, questions, threshold)
    return (right & known).float().mean().item()

def old_figures(run, threshold):
    """Exact match of old facts in held-out wordings, and which invented subjects are answered."""
    old = run.questions.only("heldout")
    updated = {fact[:2] for fact in UPDATES}
    old = old.pick(torch.tensor([i for i, row in enumerate(old.rows)
                                 if fact_of(row) not in updated]))
    right, known = answered(run, old, threshold)
    em = {split: right[old.where(split)].float().mean().item() for split in ("DEC", "LAT")}
    return em, known[old.where("NEVER")]

def measure(cfg):
    """Add the facts to a copy of a finished run: a dict of figures."""
    out = Path(cfg.out)
    seed = out.name.rsplit("_", 1)[1]
    source = out.parent.parent / out.parent.name.replace("teaching", "facts") / f"default_{seed}"
    if not (source / "speak" / "ckpt.pt").is_file():
        how = "--fast" if out.parent.name.endswith("-fast") else "--redo --results=out/results"
        raise ValueError(f"{source} is missing: run `python -m labs.facts --arms=default {how}` "
                         "first")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shutil.copy(source / "speak" / "ckpt.pt", out)
    saved = train.load_checkpoint(out)
    # the run keeps its own flags; the arm's are those of teaching, and what it changes
    changed = {name: value for name, value in dataclasses.asdict(plain(cfg)).items()
               if name.startswith("teach_") or value != getattr(train.Config, name)}
    cfg = dataclasses.replace(cfg, **saved["config"] | changed)
    lines = [f"{question}\t{answer}\n" for *_, question, answer in KNOWN + NEVER_SAID + UPDATES]
    (out / "new.tsv").write_text("".join(lines), encoding="utf-8")

    corpus = data.load(plain(cfg), data.Tokenizer.from_state(saved["tokenizer"]))
    corpus = corpus._replace(qa=corpus.qa[::cfg.every], cloze=corpus.cloze[::cfg.every])
    em_before, answered_before = old_figures(open_run(cfg, corpus), saved["threshold"])
    added = plain(cfg, added=str(out / "new.tsv"))
    run = taught = train.open_run(added, corpus, train.tjepa.TJEPA).run
    if not cfg.replay:
        hidden = relabel(run.questions, lambda row: row.split if row.split == "NEW" else "TXT")
        taught = run._replace(questions=hidden)
    fit(taught, "teach", train.teach(taught)[0])
    threshold = evaluate.recall(run, run.questions, run.concepts)["threshold"]
    em, answered_now = old_figures(run, threshold)
    return dict(
        said=share_said(run, KNOWN + NEVER_SAID, threshold),
        said_known=share_said(run, KNOWN, threshold),
        said_new=share_said(run, NEVER_SAID, threshold),
        updated=share_said(run, UPDATES, threshold),
        lost_DEC=em_before["DEC"] - em["DEC"],
        lost_LAT=em_before["LAT"] - em["LAT"],
        newly_answered=(answered_now & ~answered_before).float().mean().item())

def teaching(flags):
    """Run the arms; print the table."""
    arms = ARMS
    if flags.fast:
        flags = dataclasses.replace(flags, seeds=1, redo=True)
        arms = {name: dataclasses.replace(cfg, teach_steps=2, every=40)
                for name, cfg in ARMS.items()}
        print("labs.teaching --fast: half a minute; starts from `labs.facts --fast --arms=default`")
    rows = run_arms("teaching", arms, flags, measure)
    if not flags.fast:
        publish("teaching", rows, page_tables("teaching", rows), flags.table)

if __name__ == "__main__":
    main(teaching)
