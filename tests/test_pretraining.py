"""The pretraining lab: its controls are asked as the T-JEPA is, no probe sees what it is tested on, nothing is tuned on
test."""
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import data
import evaluate
import tjepa
import train
from data.probes import prepare
from labs import arms, pretraining
from labs.controls import MaskedLM, Reader
from labs.pretraining import ARMS, Config, Probe

SMALL = dict(n_embd=32, n_layer=2, n_head=2, pred_embd=16, top_k=2, batch_size=4, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def corpus():
    return data.load(Config())


def words(cfg, *shape):
    """Random ids that are no specials."""
    return torch.randint(cfg.vocab_size - 4, shape, generator=torch.Generator().manual_seed(0))


def model_of(name, **changes):
    """An untrained T-JEPA of an arm."""
    cfg = dataclasses.replace(ARMS[name], **{**SMALL, "vocab_size": 64, "block_size": 16, "top_k": 1, **changes})
    torch.manual_seed(0)
    return tjepa.TJEPA(cfg, [True] * 64).eval()

# -- the controls ------------------------------------------------------------------------------------------------------
def gpt():
    torch.manual_seed(0)
    return Reader(tjepa.Config(n_embd=32, n_layer=2, n_head=2, pred_embd=16, top_k=2, vocab_size=64, block_size=16))


def test_gpt_reads_no_future_and_no_padding():
    model, tokens = gpt(), words(tjepa.Config(vocab_size=64), 2, 8)
    later = tokens.clone()
    later[:, 5:] = model.cfg.pad
    for layers in (1, 2):
        assert torch.allclose(model.encode(tokens, layers)[:, :5], model.encode(later, layers)[:, :5], atol=1e-6)
        # the latent of a token has read that token
        assert not torch.allclose(model.encode(tokens, layers)[:, 5], model.encode(later, layers)[:, 5], atol=1e-3)


def test_gpt_energy_is_the_surprise_of_every_token_the_first_one_too():
    model, tokens = gpt(), words(tjepa.Config(vocab_size=64), 3, 6)
    logits = model.say(model.states(F.pad(tokens, (1, 0), value=model.cfg.bos)))            # (3, 7, V)
    by_hand = -sum(logits[:, t].log_softmax(-1)[torch.arange(3), tokens[:, t]] for t in range(6))
    assert torch.allclose(model.energy(tokens, None), by_hand, atol=1e-4)
    assert torch.allclose(model.energy(F.pad(tokens, (0, 4), value=model.cfg.pad), None), by_hand, atol=1e-4)
    loss, _ = model.pretrain_loss(F.pad(tokens, (0, 4), value=model.cfg.pad))
    assert torch.allclose(loss, by_hand.mean() / 6, atol=1e-4)


def test_masked_lm_is_asked_for_the_removed_tokens_alone():
    model = model_of("masked LM")
    tokens = words(model.cfg, 2, 8)
    tokens[1, 6:] = model.cfg.pad
    spans = torch.full_like(tokens, model.cfg.max_spans)
    spans[0, 2:5], spans[1, 2:4] = 0, 0
    total, mean = MaskedLM(model, False).energy(tokens, spans), MaskedLM(model, True).energy(tokens, spans)
    assert torch.allclose(total, mean * torch.tensor([3.0, 2.0]), atol=1e-4)
    alone = MaskedLM(model, False).energy(tokens[1:, :6], spans[1:, :6])
    assert torch.allclose(total[1:], alone, atol=1e-4)
    # what is hidden is not seen: swapping it changes the question, not what the model says
    said = [model.predict(text, spans, 3).words for text in (tokens, tokens.scatter(1, torch.tensor([[2], [2]]), 7))]
    assert torch.allclose(*said, atol=1e-5)


def test_a_reading_is_the_layers_that_it_names():
    model, tokens = model_of("default", top_k=2), words(tjepa.Config(vocab_size=64), 2, 8)
    assert torch.equal(pretraining.reading(model, 2).encode(tokens), model.encode(tokens))
    assert not torch.allclose(pretraining.reading(model, 1).encode(tokens), model.encode(tokens))
    bag = pretraining.reading(model, 0).encode
    assert torch.allclose(bag(tokens).mean(1), bag(tokens.flip(1)).mean(1), atol=1e-6)      # a bag knows no order


def test_every_arm_reads_the_same_rows(corpus, tmp_path, monkeypatch):
    drawn, batch = [], data.Text.batch
    monkeypatch.setattr(data.Text, "batch", lambda self, n: drawn.append(batch(self, n)) or drawn[-1])
    for name in ("default", "masked LM", "GPT", "paper + SIGReg"):
        cfg = dataclasses.replace(ARMS[name], **{**SMALL, "top_k": 1, "out": str(tmp_path)})
        loss_at = pretraining.open_arm(cfg)[1]
        torch.manual_seed(5)
        loss_at(0.0)[0].backward()
    assert len(drawn) == 4 and all(torch.equal(rows, drawn[0]) for rows in drawn)


def test_arms_share_tokens_width_and_schedule():
    shared = ("batch_size", "block_size", "n_embd", "n_layer", "mask_ratio", "vocab_size", "warmup", "weight_decay")
    assert all(getattr(cfg, name) == getattr(Config(), name) for cfg in ARMS.values() for name in shared)
    tuned = [dict(arm=f"facts {name} lr=0.001", lr=1e-3, dev_4=0.5) for name in ARMS]
    for budget, steps in pretraining.BUDGETS.items():
        cfgs = pretraining.finals({"facts": {}}, list(ARMS), [budget], tuned).values()
        assert {cfg.pretrain_steps for cfg in cfgs} == {steps, 0}

# -- probes ------------------------------------------------------------------------------------------------------------
def parts_of(probe):
    """For each split the texts of its three parts, as lists of numbers."""
    return [[rows.nonzero().flatten().tolist() for rows in parts] for parts in probe.splits]


def test_no_probe_is_fitted_on_what_it_is_tested_on(corpus):
    for probe in pretraining.facts_probes(corpus).values():
        tested = [i for parts in parts_of(probe) for i in parts[2]]
        assert len(set(tested)) == len(tested) > 300
        for parts in parts_of(probe):
            texts = [{probe.texts[i] for i in part} for part in parts]
            assert not (texts[0] & texts[2] or texts[0] & texts[1] or texts[1] & texts[2]) and all(map(len, texts))


def test_relation_is_asked_in_wordings_and_of_subjects_that_were_not_fitted_on(corpus):
    probe = pretraining.facts_probes(corpus)["relation"]
    of = {(row.question, row.relation): row for row in corpus.qa}
    for parts in parts_of(probe):
        rows = [[of[probe.texts[i], probe.labels[i]] for i in part] for part in parts]
        subjects = [{row.subject for row in part} for part in rows]
        wordings = [{(row.relation, row.question.lower().replace(row.subject.lower(), "{s}")) for row in part}
                    for part in rows]
        for names in subjects, wordings:
            assert not (names[0] & names[2] or names[0] & names[1])
        assert len({relation for relation, _ in wordings[2]}) > 7


def test_a_country_is_in_one_part(corpus):
    probe, countries = pretraining.facts_probes(corpus)["continent"], {
        row.question: row.subject for row in corpus.qa if row.relation in ("capital", "currency", "language")}
    for parts in probe.splits:
        seen = [{countries[probe.texts[i]] for i in rows.nonzero().flatten()} for rows in parts]
        assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
        assert all(seen)


def test_a_name_that_is_two_things_is_asked_for_neither(corpus):
    of = dict(pretraining.kinds(corpus))
    assert len(of) == len(pretraining.kinds(corpus)) > 300
    assert of["Paris"] == "city" and of["Sapiens"] == "book" and len(set(of.values())) == 16
    doubled = corpus._replace(qa=corpus.qa + [data.QA("DEC", "trained", "painter", "Paris", "Who?", "Sapiens")])
    assert not {"Paris", "Sapiens"} & dict(pretraining.kinds(doubled)).keys()


def test_tuning_looks_at_dev_and_a_final_run_at_test():
    labels = ["a", "b"] * 30
    x = torch.tensor([[1.0 if label == "a" else -1.0] for label in labels])
    part = torch.arange(60) // 20
    x[part == 2] *= -1                                                      # on test, everything is the other way
    probe = Probe([""] * 60, labels, [tuple(part == k for k in range(3))])
    assert pretraining.accuracy(x, probe, tune=True) == 1
    assert pretraining.accuracy(x, probe, tune=False) == 0


def test_texts_longer_than_a_row_are_cut(corpus, tmp_path):
    run, _ = pretraining.open_arm(Config(**SMALL, out=str(tmp_path)))
    x = pretraining.vectors(run, ["Paris is " * 300, "Paris is " * 200, "Paris"], 1)
    assert torch.allclose(x[0], x[1], atol=1e-6) and x.shape == (3, 32) and not torch.allclose(x[0], x[2], atol=1e-3)

class Latents:
    """A model whose latents are what encode makes of its ids."""
    def __init__(self, encode):
        self.cfg, self.encode = Config(), encode


def test_surface_of_latents_that_are_tokens_of_constants_and_of_noise(corpus, monkeypatch):
    monkeypatch.setattr(pretraining, "reading", lambda model, layers: model)
    codes = torch.randn(3000, 16, generator=torch.Generator().manual_seed(0))
    def measured(encode, **changes):
        return pretraining.surface(train.Run(Config(stride=4), Latents(encode), corpus, "cpu", None), 1, **changes)
    tokens = measured(lambda ids: codes[ids])
    assert tokens["identity"] > 0.99 and 0 < tokens["stability"] < 1
    assert measured(lambda ids: codes[ids], noise=0.0)["stability"] == 1
    assert measured(lambda ids: codes[ids], noise=0.5)["stability"] < tokens["stability"]
    blind = measured(lambda ids: torch.randn(*ids.shape, 16))
    assert blind["identity"] < 0.3 and abs(blind["stability"]) < 0.2

# -- the cloze ---------------------------------------------------------------------------------------------------------
class Oracle:
    """Knows by heart which texts are true (or, told so, false)."""
    def __init__(self, corpus, sign):
        statements = [item.statement.replace("{a}", item.answer) for item in corpus.cloze]
        self.cfg, self.sign = Config(), sign
        self.true = {tuple(ids) for ids in corpus.tokenizer.encode_batch([" " + text for text in statements])}

    def energy(self, tokens, spans):
        true = [tuple(t for t in row if t != self.cfg.pad) in self.true for row in tokens.tolist()]
        return -self.sign * torch.tensor(true).float()


def test_cloze_of_a_model_that_knows_and_of_one_that_lies(corpus):
    knows, lies = (pretraining.cloze(train.Run(Config(stride=4), Oracle(corpus, sign), corpus, "cpu", None))
                   for sign in (1, -1))
    assert knows["all"] == knows["same"] == knows["capital"] == 1
    assert lies["all"] == lies["same"] == 0
    assert 1 / 40 < knows["chance"] < 0.05 < knows["same_chance"] < 0.5


def test_the_cloze_among_equals_is_not_distracted_by_other_lengths(corpus):
    class Distracted(Oracle):
        """Prefers whatever is as long as nothing true; knows what is true among the rest."""
        def energy(self, tokens, spans):
            energy, lengths = super().energy(tokens, spans), (tokens != self.cfg.pad).sum(1)
            return torch.where(lengths == lengths[energy.argmin()], energy, -2.0)
    found = pretraining.cloze(train.Run(Config(stride=4), Distracted(corpus, 1), corpus, "cpu", None))
    assert found["all"] == 0 and found["same"] == 1


def test_an_arm_is_asked_for_what_it_was_trained_for(corpus, monkeypatch):
    asked = []
    monkeypatch.setattr(pretraining, "cloze", lambda run: asked.append(run.model) or dict(all=0.0))
    kinds = {"latent": [tjepa.TJEPA], "masked LM": [MaskedLM, MaskedLM], "default": [tjepa.TJEPA, MaskedLM]}
    for name, kind in kinds.items():
        model = model_of(name)
        asked.clear()
        pretraining.cloze_all(train.Run(ARMS[name], model, corpus, "cpu", None))
        assert [type(by) for by in asked] == kind
    assert asked[1].mean

# -- from runs to tables -----------------------------------------------------------------------------------------------
def test_the_choice_is_the_best_on_dev_and_the_final_run_takes_it_over():
    rows = [dict(arm="facts default lr=0.001", lr=1e-3, dev_1=0.5, dev_4=0.6),
            dict(arm="facts default lr=0.002", lr=2e-3, dev_1=0.7, dev_4=0.4),
            dict(arm="facts GPT lr=0.001", lr=1e-3, dev_1=-1.0, dev_4=0.9)]
    assert pretraining.choose(rows[:2]) == dict(pretrain_lr=2e-3, read="1", tuned="")
    runs = pretraining.finals({"facts": {}}, ["default", "GPT"], ["2.5M", "7M"], rows)
    taken = [(cfg.pretrain_lr, cfg.read, cfg.tune) for cfg in runs.values()]
    assert taken == [(2e-3, "1", False), (1e-3, "4", False)] * 2
    assert runs["facts 7M default"].eval_every * 8 == runs["facts 7M default"].pretrain_steps == 2280


def test_tuning_gives_every_trained_arm_the_same_grid():
    runs = pretraining.tuning({"facts": {}, "glosses": {}}, ["default", "masked LM", "random-init"], pretraining.GRID)
    assert len(runs) == 2 * (4 + 4 + 1) and all(cfg.tune for cfg in runs.values())


def test_tuning_survives_an_arm_that_diverges_and_a_final_run_does_not(tmp_path, monkeypatch):
    def diverge(*args):
        raise ValueError("no longer a number")
    monkeypatch.setattr(train, "fit", diverge)
    cfg = Config(**SMALL, out=str(tmp_path), tune=True)
    assert pretraining.choose([pretraining.measure(cfg), dict(lr=1.0, dev_1=0.1)])["pretrain_lr"] == 1.0
    with pytest.raises(ValueError, match="no longer"):
        pretraining.measure(dataclasses.replace(cfg, tune=False))


@pytest.mark.parametrize("name", ["default", "random-init", "GPT"])
def test_what_tuning_has_trained_is_judged_and_not_trained_again(tmp_path, monkeypatch, name):
    cfg = dataclasses.replace(ARMS[name], **SMALL, out=str(tmp_path / "tuning"), stride=25, tune=True, read="1",
                              pretrain_steps=min(2, ARMS[name].pretrain_steps))
    tuned = pretraining.measure(cfg)["weights"]
    cfg = dataclasses.replace(cfg, tune=False, out=str(tmp_path / "final"))
    anew = pretraining.measure(cfg)
    assert pretraining.measure(dataclasses.replace(cfg, tuned=tuned)) == anew
    monkeypatch.setattr(train, "fit", lambda *args: pytest.fail("trained again"))
    pretraining.measure(dataclasses.replace(cfg, tuned=tuned))
    with pytest.raises(BaseException, match="trained again"):          # another seed is another run
        pretraining.measure(dataclasses.replace(cfg, tuned=tuned, seed=1))


def test_a_run_is_judged_by_the_probes_of_its_world_and_a_quick_look_takes_fewer_texts(corpus, monkeypatch):
    rows = torch.tensor([True, False, True, False])
    monkeypatch.setattr(pretraining, "text_probes", lambda: dict(trec=Probe(list("abcd"), list("xyxy"), [(rows,) * 3])))
    def asked(**changes):
        return pretraining.probes_of(train.Run(Config(**changes), None, corpus, "cpu", None))
    whole, few = asked(), asked(stride=25)
    assert whole.keys() == set(pretraining.PROBES["facts"])
    assert all(few[name].texts == whole[name].texts[::25] for name in whole)
    assert asked(data="glosses.txt")["trec"].texts == list("abcd")
    assert asked(data="glosses.txt", stride=2)["trec"].texts == list("ac")


def test_a_long_run_is_measured_at_its_eighth_quarter_half_and_end(tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "judge", lambda run, probes: dict(probes=0.0))
    cfg = Config(**SMALL, out=str(tmp_path), pretrain_steps=8, eval_every=1, read="1")
    row = pretraining.measure(cfg)
    assert [look["tokens"] / (4 * 64) for look in row["curve"]] == [1, 2, 4, 8]
    row = pretraining.measure(dataclasses.replace(cfg, pretrain_steps=3, eval_every=10 ** 9))
    assert [look["tokens"] for look in row["curve"]] == [3 * 4 * 64]


def test_an_arm_from_its_first_step_to_its_row(tmp_path):
    for name in ("default", "GPT", "bag of random embeddings"):
        cfg = dataclasses.replace(ARMS[name], **SMALL, out=str(tmp_path), stride=25,
                                  pretrain_steps=min(2, ARMS[name].pretrain_steps), read=ARMS[name].read[0])
        row = pretraining.measure(cfg)
        json.dumps(row)
        assert {"relation", "continent", "kind", "probes", "rank"} <= row.keys()
        assert ("cloze_all" in row, "cloze_tokens_all" in row) == (
            (True, True) if name == "default" else (True, False) if name == "GPT" else (False, False))
    tuned = pretraining.measure(dataclasses.replace(cfg, tune=True))
    assert {name for name in tuned if name not in ("tokens", "lr", "curve", "weights")} == {"dev_0"}     # nothing of test


def test_a_mean_is_over_all_probes_or_not_given():
    facts = dict(arm="facts 2.5M default", seed=0, relation=0.0, continent=0.5, kind=1.0, probes=0.5, rank=3.0)
    texts = dict(arm="glosses 2.5M default", seed=0, supersense=0.1, trec=0.2, sst2=0.3, probes=0.2, rank=9.0)
    other = dict(arm="glosses 7M default", seed=0, supersense=0.9, trec=0.9, sst2=0.9, probes=0.9, rank=9.0)
    row, = pretraining.joined([facts, texts, other], "2.5M")
    assert row["probes"] == pytest.approx(0.35) and (row["rank_facts"], row["rank_glosses"]) == (3.0, 9.0)
    row, = pretraining.joined([facts], "2.5M")
    assert "probes" not in row
    tuned = [dict(arm="facts default lr=0.001", lr=1e-3, dev_1=0.5, dev_4=0.6)]
    text = pretraining.tables([facts, texts], tuned)
    assert "After 2.5M tokens" in text and "After 7M" not in text
    assert "| facts default | 0.001 | 4 | 0.600 at 0.001 |" in text and "0.350 (1 seed)" in text


def test_figure_is_drawn_where_arms_lack_a_world(tmp_path):
    looks = [dict(tokens=10 ** i, probes=0.1 * i, cloze_all=0.2) for i in (1, 2)]
    rows = [dict(arm="facts 7M default", seed=s, curve=looks) for s in (0, 1)]
    rows += [dict(arm="facts 7M random-init", seed=0, curve=[dict(tokens=0, probes=0.1)])]
    pretraining.draw(rows, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000


@pytest.mark.parametrize("flags", [dict(arms="nobody"), dict(budget="3M"), dict(world="moon")])
def test_a_bad_flag_names_what_there_is(flags):
    with pytest.raises(ValueError, match=f"--{list(flags)[0]}=.*: this lab has"):
        pretraining.Flags(**flags)

# -- the probes of real text -------------------------------------------------------------------------------------------
def shared_folder(tmp_path, line="0 What is it ?"):
    """A folder like ../shared/data, with 1,100 lines a file."""
    (tmp_path / "probes").mkdir()
    for name in ("TREC.train.all", "TREC.test.all", *(f"stsa.binary.{part}" for part in prepare.MOST)):
        lines = [f"{i % 2} text {i} of {name}" for i in range(1100)] + [line]
        (tmp_path / "probes" / name).write_text("\n".join(lines) + "\n")
    return tmp_path


def test_probes_are_prepared_alike_twice_and_no_text_is_in_two_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "HERE", tmp_path)
    folder, written = shared_folder(tmp_path), []
    noun = "00001740 {:02d} n 01 thing_{} 0 000 | gloss number {}; \"an example\"\n"
    (folder / "data.noun").write_text("  1 licence\n" + "".join(noun.format(i % 3, i, i) for i in range(3100)))
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["prepare.py", f"--input={folder}", f"--wordnet={folder}"])
        prepare.main()
        written.append({name: (tmp_path / f"{name}.tsv").read_text() for name in ("trec", "sst2", "supersense")})
    assert written[0] == written[1] and "3 classes" in capsys.readouterr().out
    for text in written[0].values():
        rows = [line.split("\t") for line in text.splitlines()]
        assert len({row[2] for row in rows}) >= len(rows) - 5               # the question that all files share
        assert all(sum(row[0] == part for row in rows) <= most for part, most in prepare.MOST.items())
    assert "thing" not in written[0]["supersense"]                         # the word itself would be too easy


def test_prepare_says_what_is_missing_and_which_file_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "HERE", tmp_path)
    monkeypatch.setattr("sys.argv", ["prepare.py", f"--input={shared_folder(tmp_path)}", "--wordnet=nowhere"])
    prepare.main()
    assert "wordnet-base" in capsys.readouterr().out and not (tmp_path / "supersense.tsv").exists()
    (tmp_path / "probes" / "TREC.test.all").write_text("no label\n")
    with pytest.raises(SystemExit):
        prepare.main()
    assert "TREC.test.all should hold lines" in capsys.readouterr().err
    (tmp_path / "probes" / "TREC.test.all").unlink()
    with pytest.raises(SystemExit):
        prepare.main()
    assert "--input=FOLDER" in capsys.readouterr().err


def test_the_lab_says_which_command_writes_its_probes(tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match="data/probes/prepare.py"):
        pretraining.text_probes()
