"""The pretraining lab: arms are comparable, and no probe sees or chooses by what is tested."""
import dataclasses
import json

import pytest
import torch

import data
import tjepa
import train
from data.probes import prepare
from labs import pretraining, probes, variants
from labs.controls import Reader, WordEnergy
from labs.pretraining import ARMS, Config
from labs.probes import Probe
from tests import toy

SMALL = dict(n_embd=32, n_layer=2, n_head=2, pred_embd=16, top_k=2, batch_size=4, dtype="fp32",
             device="cpu")


@pytest.fixture(scope="module", autouse=True)
def corpus():
    """The facts, read once for all tests here."""
    patch, facts = pytest.MonkeyPatch(), data.load(Config())
    patch.setattr(data, "load", lambda cfg, tokenizer=None: facts)
    yield facts
    patch.undo()


def small(name, out, **changes):
    """A small version of an arm."""
    return dataclasses.replace(ARMS[name], **SMALL | dict(out=str(out)) | changes)


def as_run(model, corpus, **changes):
    """A run with any model, for what only asks it."""
    return train.Run(Config(**changes), model, corpus, "cpu", None)


# -- the arms --------------------------------------------------------------------------------------
def test_arms_share_tokens_width_and_schedule():
    """They differ in the objective alone; the predictor's width is an arm of its own."""
    shared = ("batch_size", "block_size", "n_embd", "n_layer", "mask_ratio", "vocab_size",
              "warmup", "weight_decay")
    for cfg in ARMS.values():
        assert all(getattr(cfg, name) == getattr(Config(), name) for name in shared)


def test_an_arm_that_takes_over_a_learning_rate_differs_in_one_thing_from_its_control():
    """A way to improve the cloze is the hybrid with one change, or a masked LM with one."""
    for name, cfg in ARMS.items():
        if not cfg.like:
            continue
        control = ARMS[cfg.like]
        names = {field.name for field in dataclasses.fields(cfg)} - {"like", "only"}
        changed = [name for name in names if getattr(cfg, name) != getattr(control, name)]
        assert len(changed) == 1 + (name == "four hypotheses"), name    # whose control is "MSE"


def test_every_arm_reads_the_same_rows(tmp_path, monkeypatch):
    """In each step of a seed, whatever the objective draws after that."""
    drawn, batch = [], data.Text.batch
    monkeypatch.setattr(data.Text, "batch",
                        lambda self, n: drawn.append(batch(self, n)) or drawn[-1])
    for name in ("hybrid by MSE", "masked LM", "GPT", "paper + SIGReg", "fixed blocks"):
        loss_at = pretraining.open_arm(small(name, tmp_path))[1]
        torch.manual_seed(5)
        loss_at(0.0)[0].backward()
    assert len(drawn) == 5 and all(torch.equal(rows, drawn[0]) for rows in drawn)


def test_what_changes_with_time_is_told_the_time(tmp_path):
    """Or a teacher would never end, and spans never grow."""
    run, loss_at = pretraining.open_arm(small("growing spans", tmp_path, top_k=3))
    for progress in 0.0, 0.5:
        loss_at(progress)
        assert run.model.progress == progress


def test_of_a_frozen_target_the_context_encoder_is_read(tmp_path):
    """The target encoder has learned nothing."""
    tokens = torch.arange(12)[None]
    for name, learns in ("frozen random target", "context_encoder"), ("latent", "target_encoder"):
        model = pretraining.open_arm(small(name, tmp_path, top_k=3))[0].model
        before = pretraining.reading(model, 1).encode(tokens)
        torch.nn.init.zeros_(getattr(model, learns).blocks[0].mlp[0].weight)
        assert not torch.equal(before, pretraining.reading(model, 1).encode(tokens)), name


def test_sigreg_to_0_falls_on_a_line(tmp_path):
    """The arm that is written down keeps its weight."""
    run, loss_at = pretraining.open_arm(small("SIGReg to 0", tmp_path))
    for progress, weight in (0.0, 1.0), (0.5, 0.5), (1.0, 0.0):
        loss_at(progress)
        assert run.model.cfg.sigreg == weight
    assert run.cfg.sigreg == 1


# -- fixed blocks ----------------------------------------------------------------------------------
def blocks_of(model, tokens, starts):
    """Blocks of 3 tokens that are removed, and which tokens these are."""
    torch.manual_seed(3)
    blocks = variants.sample_blocks(tokens, 3, starts, model.cfg)
    return blocks, blocks < model.cfg.max_spans


def test_blocks_lie_on_a_grid():
    """A block is one cell of the grid; all but the last one are whole."""
    model, tokens = toy.make(), toy.rows(64)
    blocks, gone = blocks_of(model, tokens, torch.ones_like(model.word_start))
    for row, removed in zip(blocks, gone):
        for block in row[removed].unique():
            cells = (row == block).nonzero().flatten() // 3
            assert len(cells.unique()) == 1
        sizes = (removed.nonzero().flatten() // 3).bincount()
        assert (sizes[sizes > 0] < 3).sum() <= 2        # the last one, and the end of the row


def test_blocks_remove_as_much_as_spans_do():
    """Otherwise the arm would have an easier or a harder task. Padding is never removed."""
    model, tokens = toy.make(), toy.rows(8, pad=2)
    _, gone = blocks_of(model, tokens, torch.ones_like(model.word_start))
    spans = toy.spans_of(model, tokens) < model.cfg.max_spans
    assert torch.equal(gone.sum(1), spans.sum(1))
    assert not (gone & (tokens == toy.PAD)).any()


def test_blocks_of_whole_words_cut_one_word_at_most():
    """The last block may be cut short; every other word is removed as a whole, in one block."""
    model, tokens = toy.make(), toy.rows(64)
    blocks, gone = blocks_of(model, tokens, model.word_start)
    inside = ~model.word_start[tokens[:, 1:]]           # this token and the one before: one word
    cut = inside & (gone[:, 1:] != gone[:, :-1])
    assert (cut.sum(1) <= 1).all()
    both = inside & gone[:, 1:] & gone[:, :-1]
    assert (blocks[:, 1:] == blocks[:, :-1])[both].all()


@pytest.mark.parametrize("kind", [variants.FixedBlocks, variants.FixedBlocksOfWords])
def test_the_classes_of_blocks_train_on_blocks(kind, monkeypatch):
    """The spans that the loop has drawn are replaced."""
    model, tokens = toy.make(kind), toy.rows()
    asked = []
    monkeypatch.setattr(tjepa.TJEPA, "pretrain_loss", lambda self, *batch: asked.append(batch))
    torch.manual_seed(3)
    model.pretrain_loss(tokens, None)
    every = torch.ones_like(model.word_start)
    starts = every if kind is variants.FixedBlocks else model.word_start
    assert torch.equal(asked[0][1], blocks_of(model, tokens, starts)[0])


# -- probes ----------------------------------------------------------------------------------------
def items_of(probe):
    """For each split the numbers of the texts of its three parts."""
    return [[rows.nonzero().flatten().tolist() for rows in parts] for parts in probe.splits]


@pytest.mark.parametrize("name", ["relation", "continent", "kind"])
def test_no_probe_is_fitted_on_what_it_is_tested_on(corpus, name):
    """No text is in two parts of a split, and each is tested at most once."""
    probe = probes.facts_probes(corpus)[name]
    tested = [i for parts in items_of(probe) for i in parts[2]]
    assert len(set(tested)) == len(tested) > 300
    for parts in items_of(probe):
        fitted, dev, test = ({probe.texts[i] for i in part} for part in parts)
        assert fitted and dev and test
        assert not (fitted & test or fitted & dev or dev & test)


def test_relation_is_asked_in_wordings_and_of_subjects_that_were_not_fitted_on(corpus):
    """A probe that knows a wording or a subject by heart gains nothing."""
    probe = probes.facts_probes(corpus)["relation"]
    of = {(row.question, row.relation): row for row in corpus.qa}

    def wording(row):
        return row.relation, row.question.lower().replace(row.subject.lower(), "{s}")
    for parts in items_of(probe):
        rows = [[of[probe.texts[i], probe.labels[i]] for i in part] for part in parts]
        for name in wording, lambda row: row.subject:
            fitted, dev, test = ({name(row) for row in part} for part in rows)
            assert not (fitted & test or fitted & dev)
        assert len({row.relation for row in rows[2]}) > 7


def test_a_country_is_in_one_part(corpus):
    """The continent of a country that was fitted on could be remembered."""
    probe = probes.facts_probes(corpus)["continent"]
    country = {row.question: row.subject for row in corpus.qa
               if row.relation in ("capital", "currency", "language")}
    for parts in items_of(probe):
        fitted, dev, test = ({country[probe.texts[i]] for i in part} for part in parts)
        assert not (fitted & dev or fitted & test or dev & test)


def test_a_name_of_two_kinds_is_asked_for_neither(corpus):
    """Its class would be arbitrary."""
    of = dict(probes.kinds(corpus))
    assert len(of) == len(probes.kinds(corpus)) > 300 and len(set(of.values())) == 16
    assert of["Paris"] == "city" and of["Sapiens"] == "book"
    both = data.QA("DEC", "trained", "painter", "Paris", "Who?", "Sapiens")
    doubled = corpus._replace(qa=corpus.qa + [both])
    assert not {"Paris", "Sapiens"} & dict(probes.kinds(doubled)).keys()


def test_tuning_reads_dev_and_a_final_run_test():
    """On test everything is the other way round: only a final run may notice."""
    labels = ["a", "b"] * 30
    x = torch.tensor([[1.0 if label == "a" else -1.0] for label in labels])
    part = torch.arange(60) // 20
    x[part == 2] *= -1
    probe = Probe([""] * 60, labels, [tuple(part == k for k in range(3))])
    assert probes.accuracy(x, probe, tune=True) == 1
    assert probes.accuracy(x, probe, tune=False) == 0


def test_a_quick_look_takes_fewer_texts(corpus, monkeypatch):
    """Every n-th text of the probes of the world that was read."""
    rows = torch.tensor([True, False, True, False])
    trec = Probe(list("abcd"), list("xyxy"), [(rows,) * 3])
    monkeypatch.setattr(pretraining, "text_probes", lambda: dict(trec=trec))

    def asked(**changes):
        return pretraining.probes_of(as_run(None, corpus, **changes))
    whole, few = asked(), asked(stride=25)
    assert all(few[name].texts == whole[name].texts[::25] for name in probes.PROBES["facts"])
    assert asked(data="glosses.txt")["trec"].texts == list("abcd")
    assert asked(data="glosses.txt", stride=2)["trec"].texts == list("ac")


# -- what is read from the latents -----------------------------------------------------------------
def test_a_reading_is_the_layers_that_it_names():
    """2 layers are what the target is made of here; 0 are the embeddings, which know no order."""
    model, tokens = toy.make(), toy.rows(2, 8)
    assert torch.equal(pretraining.reading(model, 2).encode(tokens), model.encode(tokens))
    assert not torch.allclose(pretraining.reading(model, 1).encode(tokens), model.encode(tokens))
    bag = pretraining.reading(model, 0).encode
    assert torch.allclose(bag(tokens).mean(1), bag(tokens.flip(1)).mean(1), atol=1e-6)


def test_texts_longer_than_a_row_are_cut(tmp_path):
    """They differ only after block_size tokens, so their vectors are equal."""
    run, _ = pretraining.open_arm(small("hybrid by MSE", tmp_path))
    x = pretraining.vectors(run, ["Paris is " * 300, "Paris is " * 200, "Paris"], 1)
    assert x.shape == (3, 32)
    assert torch.allclose(x[0], x[1], atol=1e-6) and not torch.allclose(x[0], x[2], atol=1e-3)


class Latents:
    """A model whose latents are a function of its ids."""

    def __init__(self, encode):
        self.cfg, self.encode = Config(), encode


def test_surface_of_latents_that_are_tokens_and_of_noise(corpus, monkeypatch):
    """A code for each token shows its identity; noise shows nothing, and keeps no text in place."""
    monkeypatch.setattr(pretraining, "reading", lambda model, layers: model)
    codes = torch.randn(3000, 16, generator=torch.Generator().manual_seed(0))

    def measured(encode, **changes):
        return pretraining.surface(as_run(Latents(encode), corpus, stride=4), 1, **changes)
    tokens = measured(lambda ids: codes[ids])
    assert tokens["identity"] > 0.99 and 0 < tokens["stability"] < 1
    assert measured(lambda ids: codes[ids], noise=0.0)["stability"] == 1
    assert measured(lambda ids: codes[ids], noise=0.5)["stability"] < tokens["stability"]
    blind = measured(lambda ids: torch.randn(*ids.shape, 16))
    assert blind["identity"] < 0.3 and abs(blind["stability"]) < 0.2


# -- the cloze -------------------------------------------------------------------------------------
class Oracle:
    """Gives true statements the lowest energy, or the highest if sign is -1."""

    def __init__(self, corpus, sign=1):
        statements = [" " + item.statement.replace("{a}", item.answer) for item in corpus.cloze]
        self.cfg, self.sign = Config(), sign
        self.true = {tuple(ids) for ids in corpus.tokenizer.encode_batch(statements)}

    def energy(self, tokens, span_ids):
        """(B, T) -> (B,)."""
        texts = [tuple(t for t in row if t != self.cfg.pad) for row in tokens.tolist()]
        return -self.sign * torch.tensor([text in self.true for text in texts]).float()


class Distracted(Oracle):
    """Prefers every length that is not the true one's, and knows what is true among equals."""

    def energy(self, tokens, span_ids):
        """(B, T) -> (B,)."""
        energy = super().energy(tokens, span_ids)
        lengths = (tokens != self.cfg.pad).sum(1)
        return torch.where(lengths == lengths[energy.argmin()], energy, -2.0)


@pytest.mark.parametrize("model, every, same", [
    (lambda corpus: Oracle(corpus, 1), 1, 1),
    (lambda corpus: Oracle(corpus, -1), 0, 0),
    (lambda corpus: Distracted(corpus), 0, 1),
])
def test_cloze_of_models_whose_answers_are_known(corpus, model, every, same):
    """Among equals other lengths do not distract; the chances stand beside the figures."""
    found = pretraining.cloze(as_run(model(corpus), corpus, stride=4))
    assert (found["all"], found["capital"], found["same"]) == (every, every, same)
    assert 1 / 40 < found["chance"] < 0.05 < found["same_chance"] < 0.5


@pytest.mark.parametrize("name, kinds", [
    ("latent", [tjepa.TJEPA]),
    ("hybrid by MSE", [tjepa.TJEPA, WordEnergy]),
    ("masked LM", [WordEnergy, WordEnergy]),
    ("GPT", [Reader]),
])
def test_an_arm_is_asked_for_what_it_was_trained_on(tmp_path, monkeypatch, name, kinds):
    """A masked LM has no latent energy; its own cloze is the mean over tokens."""
    asked = []
    monkeypatch.setattr(pretraining, "cloze", lambda run: asked.append(run.model) or {})
    pretraining.cloze_all(pretraining.open_arm(small(name, tmp_path))[0])
    assert [type(model) for model in asked] == kinds
    if name == "masked LM":
        assert [model.mean for model in asked] == [True, False]


# -- from runs to tables ---------------------------------------------------------------------------
def tuned(arm, **figures):
    """A row of a tuning run."""
    return dict(arm=f"facts {arm}", **figures)


def test_the_choice_is_the_best_on_dev_and_the_final_runs_take_it_over():
    """Also those arms that are like another one; they have 7M tokens of facts only."""
    rows = [tuned("hybrid by MSE lr=0.001", lr=1e-3, dev_1=0.5, dev_4=0.6),
            tuned("hybrid by MSE lr=0.002", lr=2e-3, dev_1=0.7, dev_4=0.4),
            tuned("GPT lr=0.001", lr=1e-3, dev_1=-1.0, dev_4=0.9)]
    names = ["hybrid by MSE", "GPT", "two masks"]
    runs = pretraining.finals(["facts"], names, ["2.5M", "7M"], rows)
    taken = {name: (cfg.pretrain_lr, cfg.read, cfg.tune) for name, cfg in runs.items()}
    assert taken == {
        "facts 2.5M hybrid by MSE": (2e-3, "1", False), "facts 2.5M GPT": (1e-3, "4", False),
        "facts 7M hybrid by MSE": (2e-3, "1", False), "facts 7M GPT": (1e-3, "4", False),
        "facts 7M two masks": (2e-3, "1", False)}
    hybrid = runs["facts 7M hybrid by MSE"]
    assert hybrid.eval_every * 8 == hybrid.pretrain_steps


def test_tuning_gives_every_trained_arm_the_same_grid():
    """Without steps one learning rate is enough; an arm that is like another one is not tuned."""
    names = ["hybrid by MSE", "two masks", "masked LM", "random-init"]
    runs = pretraining.tuning(["facts", "glosses"], names, pretraining.GRID)
    assert len(runs) == 2 * (4 + 4 + 1) and all(cfg.tune for cfg in runs.values())


def test_tuning_survives_an_arm_that_diverges_and_a_final_run_does_not(tmp_path, monkeypatch):
    """That a rate is too high is a result of tuning, and an error everywhere else."""
    def diverge(*args):
        raise ValueError("no longer a number")
    monkeypatch.setattr(pretraining, "fit", diverge)
    cfg = small("hybrid by MSE", tmp_path, tune=True)
    rows = [pretraining.measure(cfg), dict(lr=1.0, dev_1=0.1)]
    assert pretraining.choose(rows) == dict(pretrain_lr=1.0, read="1")
    with pytest.raises(ValueError, match="no longer"):
        pretraining.measure(dataclasses.replace(cfg, tune=False))


def test_a_long_run_is_measured_at_its_eighth_quarter_half_and_end(tmp_path, monkeypatch):
    """A short one at its end alone."""
    monkeypatch.setattr(pretraining, "judge", lambda run, probes: dict(probes=0.0))
    row = pretraining.measure(small("hybrid by MSE", tmp_path, pretrain_steps=8, eval_every=1))
    assert [look["tokens"] / (4 * 64) for look in row["curve"]] == [1, 2, 4, 8]
    row = pretraining.measure(small("hybrid by MSE", tmp_path, pretrain_steps=3))
    assert [look["tokens"] for look in row["curve"]] == [3 * 4 * 64]


@pytest.mark.parametrize("name, cloze", [
    ("hybrid by MSE", {"cloze_all", "cloze_tokens_all"}),
    ("GPT", {"cloze_all"}),
    ("bag of random embeddings", set()),
])
def test_an_arm_from_its_first_step_to_its_row(tmp_path, name, cloze):
    """A bag has no order, and so no gap."""
    steps = min(2, ARMS[name].pretrain_steps)
    cfg = small(name, tmp_path, stride=25, pretrain_steps=steps, read=ARMS[name].read[0])
    row = pretraining.measure(cfg)
    json.dumps(row)
    assert {"relation", "continent", "kind", "probes", "rank"} <= row.keys()
    assert {"cloze_all", "cloze_tokens_all"} & row.keys() == cloze


def test_a_tuning_run_measures_dev_alone(tmp_path):
    """What is not measured cannot be chosen by."""
    row = pretraining.measure(small("random-init", tmp_path, stride=25, tune=True))
    assert set(row) - {"tokens", "lr", "curve"} == {"dev_1", "dev_4"}


def test_a_mean_is_over_all_probes_or_not_given():
    """Facts and glosses of an arm and budget are one row; one world alone has no mean of all."""
    facts = dict(arm="facts 2.5M hybrid by MSE", seed=0, probes=0.5, cloze_all=0.7)
    glosses = dict(arm="glosses 2.5M hybrid by MSE", seed=0, probes=0.2)
    other = glosses | dict(arm="glosses 7M hybrid by MSE", probes=0.9)
    row, part = pretraining.joined([facts, glosses, other])
    assert row["all 2.5M"] == pytest.approx(0.35) and "all 7M" not in row
    assert (row["facts 2.5M"], row["glosses 7M"], row["cloze 2.5M"]) == (0.5, 0.9, 0.7)
    assert (part["arm"], part["probes"]) == ("hybrid by MSE, 2.5M", 0.5)


def test_what_tuning_chose_is_the_best_dev_accuracy():
    """Over rates and readings."""
    text = pretraining.choices([tuned("hybrid by MSE lr=0.001", lr=1e-3, dev_1=0.5, dev_4=0.6),
                                tuned("hybrid by MSE lr=0.002", lr=2e-3, dev_1=0.4, dev_4=0.5)])
    assert "| facts hybrid by MSE | 0.001 | 4 | 0.600 at 0.001, 0.500 at 0.002 |" in text


@pytest.mark.parametrize("flags", [dict(arms="nobody"), dict(budget="3M"), dict(world="moon")])
def test_a_bad_flag_names_what_there_is(flags):
    """Before anything is run."""
    with pytest.raises(ValueError, match=f"--{list(flags)[0]}=.*: this lab has"):
        pretraining.Flags(**flags)


# -- the probes of real text -----------------------------------------------------------------------
def shared_folder(tmp_path):
    """A folder like ../shared/data, with 1,100 lines a file and one line that all files share."""
    (tmp_path / "probes").mkdir()
    names = ("TREC.train.all", "TREC.test.all", *(f"stsa.binary.{part}" for part in prepare.MOST))
    for name in names:
        lines = [f"{i % 2} text {i} of {name}" for i in range(1100)] + ["0 What is it ?"]
        (tmp_path / "probes" / name).write_text("\n".join(lines) + "\n")
    return tmp_path


def test_probes_are_prepared_alike_twice_and_no_text_is_in_two_parts(tmp_path, monkeypatch, capsys):
    """The word that a gloss explains is left out: it would be too easy."""
    monkeypatch.setattr(prepare, "HERE", tmp_path)
    folder, written = shared_folder(tmp_path), []
    noun = "00001740 {:02d} n 01 thing_{} 0 000 | gloss number {}; \"an example\"\n"
    nouns = "".join(noun.format(i % 3, i, i) for i in range(3100))
    (folder / "data.noun").write_text("  1 licence\n" + nouns)
    for _ in range(2):
        argv = ["prepare.py", f"--input={folder}", f"--wordnet={folder}"]
        monkeypatch.setattr("sys.argv", argv)
        prepare.main()
        written.append({name: (tmp_path / f"{name}.tsv").read_text()
                        for name in ("trec", "sst2", "supersense")})
    assert written[0] == written[1] and "3 classes" in capsys.readouterr().out
    for text in written[0].values():
        rows = [line.split("\t") for line in text.splitlines()]
        assert len({row[2] for row in rows}) >= len(rows) - 5       # but for the shared line
        for part, most in prepare.MOST.items():
            assert sum(row[0] == part for row in rows) <= most
    assert "thing" not in written[0]["supersense"]


def test_prepare_says_what_is_missing_and_which_file_is_wrong(tmp_path, monkeypatch, capsys):
    """Without WordNet the other probes are written; a wrong or missing file ends it."""
    monkeypatch.setattr(prepare, "HERE", tmp_path)
    argv = ["prepare.py", f"--input={shared_folder(tmp_path)}", "--wordnet=nowhere"]
    monkeypatch.setattr("sys.argv", argv)
    prepare.main()
    assert "wordnet-base" in capsys.readouterr().out
    assert not (tmp_path / "supersense.tsv").exists()
    test_file = tmp_path / "probes" / "TREC.test.all"
    test_file.write_text("no label\n")
    with pytest.raises(SystemExit):
        prepare.main()
    assert "TREC.test.all should hold lines" in capsys.readouterr().err
    test_file.unlink()
    with pytest.raises(SystemExit):
        prepare.main()
    assert "--input=FOLDER" in capsys.readouterr().err


def test_the_lab_says_which_command_writes_its_probes(tmp_path, monkeypatch):
    """They are not shipped."""
    monkeypatch.setattr(probes, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match="data/probes/prepare.py"):
        probes.text_probes()
