"""What can be relied on when two views of a pair are compared, one property a test."""
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from data.nlrx import prepare
from labs import arms
from labs import llm_jepa as lab
from labs.arms import Flags
from tests.toy import REGEXES as PAIRS, write_regexes

SHARED = Path(__file__).parents[2] / "shared" / "data" / "nlrx"
TOKENIZER = lab.vocabulary(lab.views_of(lab.Config(), PAIRS))
SMALL = lab.Config(n_layer=2, n_head=2, n_embd=32, top_k=2, dtype="fp32", qa_batch_size=16,
                   vocab_size=TOKENIZER.vocab_size)


def model_of(**changes):
    """A small GPT, always with the same weights."""
    torch.manual_seed(0)
    return lab.GPT(dataclasses.replace(SMALL, **changes))


def batch_of(pairs=PAIRS):
    """Descriptions and regexes, both of several lengths."""
    return lab.pack(TOKENIZER, lab.views_of(SMALL, pairs), SMALL, "cpu")


def moved(batch, *names):
    """The batch with some of its views moved on by a row: those of other pairs."""
    return batch | {name: batch[name].roll(1, 0) for name in names}


def real(row, model):
    """A row without its padding."""
    return row[row != model.cfg.pad]


# -- two views -------------------------------------------------------------------------------------

@pytest.mark.parametrize("k", [0, 2])
def test_z_is_the_state_of_the_last_token_of_a_view_read_alone(k):
    model, batch = model_of(k=k), batch_of()
    bos = torch.tensor([model.cfg.bos])
    predictor = torch.tensor([model.cfg.mask] * k).long()
    together = model.views(batch)
    for i in range(len(PAIRS)):             # one by one, without padding
        text = torch.cat((bos, real(batch["description"][i], model), predictor))
        code = torch.cat((bos, real(batch["regex"][i], model)))
        for z, view in zip(together, (text, code)):
            alone = model.states(view[None])[0, -1]
            torch.testing.assert_close(z[i], alone, atol=1e-5, rtol=1e-4)


def test_no_view_sees_the_other():
    model, batch = model_of(k=1), batch_of()
    z_text, z_code = model.views(batch)
    torch.testing.assert_close(model.views(moved(batch, "regex"))[0], z_text)
    torch.testing.assert_close(model.views(moved(batch, "description"))[1], z_code)
    other_text, other_code = model.views(moved(batch, "description", "regex"))
    assert not torch.allclose(other_text, z_text)
    assert not torch.allclose(other_code, z_code)


def test_predictor_tokens_end_the_descriptions_view_and_are_nowhere_else(monkeypatch):
    model, batch = model_of(k=3, latent=1.0), batch_of()
    read = []

    def states(tokens):
        read.append(tokens)
        return lab.GPT.states(model, tokens)
    monkeypatch.setattr(model, "states", states)
    model.loss(batch)
    packed, text, code = read
    assert not (packed == model.cfg.mask).any()
    assert not (code == model.cfg.mask).any()
    for row, description in zip(text, batch["description"]):
        expected = [model.cfg.bos] + real(description, model).tolist() + [model.cfg.mask] * 3
        assert real(row, model).tolist() == expected


# -- the loss --------------------------------------------------------------------------------------

@pytest.mark.parametrize("eos", [True, False])
def test_the_loss_asks_for_the_regex_and_for_eos_only_if_told(eos, monkeypatch):
    model, batch = model_of(eos_in_loss=eos), batch_of()
    asked = []

    def cross_entropy(logits, words):
        asked.extend(words.tolist())
        return torch.zeros(())
    monkeypatch.setattr(lab.F, "cross_entropy", cross_entropy)
    model.loss(batch)
    expected = []
    for regex in batch["regex"]:
        expected += real(regex, model).tolist() + [model.cfg.eos] * eos
    assert asked == expected


def test_without_eos_in_the_loss_its_logit_gets_no_push_upwards():
    def gradient(eos):
        """Of the loss by a bias of EOS's logit."""
        model = model_of(eos_in_loss=eos)
        bias = torch.zeros(model.cfg.vocab_size, requires_grad=True)
        model.say = lambda states: states @ model.embed.weight.T + bias
        model.loss(batch_of())[0].backward()
        return bias.grad[model.cfg.eos].item()
    assert gradient(True) < 0 < gradient(False)


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_equal_latents_are_at_distance_0(distance, monkeypatch):
    model, z = model_of(distance=distance), torch.randn(8, 32)
    monkeypatch.setattr(model, "views", lambda batch: (z, z.clone()))
    assert model.latent_loss(None).abs() < 1e-6
    monkeypatch.setattr(model, "views", lambda batch: (z, -z))
    assert model.latent_loss(None) > 1


def test_infonce_wants_the_own_regex_nearer_than_the_others(monkeypatch):
    model, z = model_of(distance="infonce"), torch.eye(8, 32)
    monkeypatch.setattr(model, "views", lambda batch: (z, z))
    assert model.latent_loss(None) < 0.01
    monkeypatch.setattr(model, "views", lambda batch: (z, z.roll(1, 0)))
    assert model.latent_loss(None) > 5


@pytest.mark.parametrize("stop", [True, False])
def test_stop_gradient_stops_the_target_and_only_the_target(stop, monkeypatch):
    model = model_of(stop_gradient=stop)
    guess = torch.randn(8, 32, requires_grad=True)
    target = torch.randn(8, 32, requires_grad=True)
    monkeypatch.setattr(model, "views", lambda batch: (guess, target))
    model.latent_loss(None).backward()
    assert guess.grad.abs().sum() > 0
    assert (target.grad is None) == stop


@pytest.mark.parametrize("changes, reads", [
    (dict(latent=1.0), True),
    (dict(latent=0.0), False),
    (dict(latent=1.0, latent_drop=1.0), False)])
def test_the_views_are_read_only_if_they_count(changes, reads, monkeypatch):
    model = model_of(**changes)
    read = []

    def views(batch):
        read.append(batch)
        return lab.GPT.views(model, batch)
    monkeypatch.setattr(model, "views", views)
    loss, stats = model.loss(batch_of())
    assert bool(read) == reads == ("latent" in stats)
    torch.testing.assert_close(loss.detach(), stats["token"] + stats.get("latent", 0))


def test_an_mlp_or_predictor_tokens_leave_the_other_weights_as_they_are():
    plain = model_of().state_dict()
    for changed in model_of(mlp=True).state_dict(), model_of(k=3).state_dict():
        assert all(torch.equal(changed[name], value) for name, value in plain.items())


# -- writing ---------------------------------------------------------------------------------------

def test_greedy_with_cache_writes_what_it_writes_without():
    model, batch = model_of(answer_size=12), batch_of()
    with torch.no_grad():
        model.embed.weight *= 20            # an untrained model: its choices become clear
        for row in batch["description"]:
            row = real(row, model)[None]
            tokens = lab.join(model.cfg.pad, model.cfg.bos, row, lab.SEP)
            start = tokens.size(1)
            while tokens.size(1) < start + 12 and tokens[0, -1] != model.cfg.eos:
                best = model.say(model.states(tokens))[0, -1].argmax()
                tokens = torch.cat((tokens, best.view(1, 1)), dim=1)
            alone = tokens[0, start:].tolist()
            assert model.generate(tokens[:, :start], 12)[0, :len(alone)].tolist() == alone


def test_nothing_is_written_after_eos(monkeypatch):
    model = model_of(answer_size=4)
    eos = model.cfg.eos
    ids = torch.tensor([[5, eos, 6, eos], [5, 6, 7, 8], [eos] * 4])
    monkeypatch.setattr(model, "generate", lambda prompt, n: ids)
    run = lab.train.Run(model.cfg, model, None, "cpu", None)
    assert lab.write(run, TOKENIZER, ["a"] * 3) == ["\5", "\5\6\7\b", ""]


def test_padding_in_between_moves_to_the_right():
    first = torch.tensor([[1, 2, 0, 0], [1, 0, 0, 0]])
    second = torch.tensor([[3, 0], [3, 4]])
    rows = lab.join(0, 7, first, 8, second, 9)
    assert rows.tolist() == [[7, 1, 2, 8, 3, 9], [7, 1, 8, 3, 4, 9]]


def test_an_atom_is_one_token_and_any_text_comes_back():
    regex = r"\b([A-Z]){3,}.*(dog)"
    tokenizer = lab.vocabulary(dict(regex=[regex] * 2))
    atoms = [tokenizer.decode([i]) for i in tokenizer.encode(regex)]
    assert atoms == [r"\b", "(", "[A-Z]", ")", "{3,}", ".*", "(", "dog", ")"]
    text = "never seen: Škoda"
    assert tokenizer.decode(tokenizer.encode(text)) == text


# -- scoring ---------------------------------------------------------------------------------------

def test_a_regex_that_goes_on_is_no_exact_match_but_has_the_right_prefix():
    gold = "(dog).*"
    said = ["(dog).*", "(dog).*.*", "(dog)+.", "(dog)", ""]
    assert lab.score(said, [("", gold)] * 5) == dict(exact=1 / 5, prefix=2 / 5)


def test_a_leak_is_a_test_description_of_the_training_file():
    known = [("a", "x"), ("b", "y")]
    test = [("a", "x"), ("c", "y"), ("d", "z"), ("B", "y")]
    # the description decides: a regex may be asked for in other words
    assert prepare.leaked(known, test) == [True, False, False, False]


def test_alike_knows_pairs_from_strangers():
    z = torch.eye(4)
    found = lab.alike(z, z, ["x", "y", "z", "x"])
    assert found["paired"] == 1
    assert found["unpaired"] == 0
    assert found["r1"] == 1
    assert found["r1_chance"] == 6 / 16
    assert lab.alike(z, z.roll(1, 0), ["x", "y", "z", "v"])["r1"] == 0


def test_the_commonest_reading_of_a_sentence_needs_no_model():
    known = [("not a vowel before a number", "~(([aeiou]).*([0-9]))")] * 2
    known += [("not a number before a vowel", "(~([0-9])).*([aeiou])"), ("a letter", "[A-Za-z]")]
    guess = prepare.majority(known)
    assert guess("not a number before a letter") == "~(([0-9]).*([A-Za-z]))"
    assert guess("a vowel or a letter") == ""           # a sentence that it has not seen


# -- a run -----------------------------------------------------------------------------------------

@pytest.fixture
def files(tmp_path, monkeypatch):
    """PAIRS to learn from, the last three held out; three test pairs, one of them a leak."""
    write_regexes(tmp_path)
    monkeypatch.setattr(lab, "FOLDER", tmp_path)
    monkeypatch.setattr(lab, "HELD", 3)
    return tmp_path


def test_a_seed_draws_the_pairs_and_never_those_held_out(monkeypatch):
    monkeypatch.setattr(lab, "HELD", 3)
    few, held = lab.draw(PAIRS, 10, 0)
    more, _ = lab.draw(PAIRS, 20, 0)
    assert held == PAIRS[-3:]
    assert more[:10] == few
    assert len(set(more)) == 20 and not set(more) & set(held)
    assert lab.draw(PAIRS, 10, 1)[0] != few
    everything, none = lab.draw(PAIRS, len(PAIRS), 0)
    assert sorted(everything) == sorted(PAIRS)
    assert none == []


def test_the_batches_follow_from_the_seed_whatever_the_arm(files, monkeypatch):
    def batches(**changes):
        """The descriptions of each step."""
        seen = []

        def loss(model, batch):
            seen.append(batch["description"].tolist())
            torch.rand(model.cfg.k + 1)     # arms draw other numbers afterwards
            return model.embed.weight.mean(), {}
        monkeypatch.setattr(lab.GPT, "loss", loss)
        cfg = dataclasses.replace(SMALL, speak_steps=4, out=str(files), **changes)
        lab.learn(cfg, PAIRS)
        return seen
    first = batches()
    assert batches(k=3, latent=1.0) == first
    assert batches(seed=1) != first
    assert all(first[i] != first[j] for i in range(4) for j in range(i))


def test_what_is_taught_is_learned_with_the_latent_term_on(files):
    cfg = dataclasses.replace(SMALL, latent=1.0, k=1, speak_steps=200, speak_lr=5e-3,
                              out=str(files))
    run, tokenizer = lab.learn(cfg, PAIRS)
    said = lab.write(run, tokenizer, [text for text, _ in PAIRS])
    assert lab.score(said, PAIRS)["exact"] > 0.9
    batch = lab.pack(tokenizer, lab.views_of(cfg, PAIRS), cfg, "cpu")
    with torch.no_grad():
        found = lab.alike(*run.model.views(batch), [regex for _, regex in PAIRS])
    assert found["paired"] > 0.9
    assert found["paired"] > found["unpaired"]


@pytest.mark.parametrize("changes", [{}, dict(view="people", latent=1.0)])
def test_an_arm_is_judged_on_test_pairs_that_are_no_leaks(changes, files, monkeypatch):
    judged = []
    score = lab.score

    def spy(said, pairs):
        judged.append(pairs)
        return score(said, pairs)
    monkeypatch.setattr(lab, "score", spy)
    cfg = dataclasses.replace(SMALL, size=20, speak_steps=1, out=str(files / "run"), **changes)
    found = lab.measure(cfg)
    assert {"exact", "prefix", "dev", "token_loss", "paired", "r1"} <= set(found)
    test, held = judged
    assert test == lab.read("synth_test")[1:]           # the first is the leak
    assert held == PAIRS[-3:]


def test_the_view_of_people_is_what_they_said_of_the_same_regex(files):
    views = lab.views_of(lab.Config(view="people"), PAIRS[:2])
    assert views["people"] == [f" people: {text}" for text, _ in PAIRS[:2]]
    model, batch = model_of(view="people", latent=1.0), batch_of()
    batch["people"] = batch["description"].roll(1, 0)
    z_text, z_other = model.views(batch)
    # with k = 0 a text has one latent, whichever view it is
    torch.testing.assert_close(z_other, z_text.roll(1, 0))
    torch.testing.assert_close(model.views(moved(batch, "regex"))[1], z_other)


# -- the arms --------------------------------------------------------------------------------------

def test_every_arm_of_a_size_takes_the_same_steps():
    for name, cfg in lab.ARMS.items():
        assert cfg.speak_steps == lab.STEPS[cfg.size] * (2 if "twice" in name else 1), name


def test_the_latent_arms_take_the_best_of_the_map():
    taken = [(cfg.latent, cfg.k) for name, cfg in lab.SQUARE.items() if " latent" in name]
    assert taken == [(lab.BEST["latent"], lab.BEST["k"])] * 6
    assert lab.BEST in [dict(latent=cfg.latent, k=cfg.k) for cfg in lab.MAP.values()]


def test_a_group_stands_for_its_arms_and_an_unknown_name_is_refused(files, tmp_path):
    flags = Flags(arms="map,250 latent", out=str(tmp_path), fast=True)
    names = [*lab.MAP, "250 latent"]
    ran = []

    def run_arms(lab_name, some, flags, measure):
        ran.append(flags.arms.split(","))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "run_arms", run_arms)
        lab.llm_jepa(flags)
    assert ran == [names]
    with pytest.raises(ValueError, match="--arms=mapp"):
        lab.llm_jepa(Flags(arms="mapp", out=str(tmp_path)))


# -- the files -------------------------------------------------------------------------------------

def folder_of(tmp_path, turk_regexes=("x", "y")):
    """A folder like the published one, with two training pairs and a test pair."""
    def write(name, pairs):
        """A .jsonl file of chats: system, description, regex."""
        lines = []
        for pair in pairs:
            chat = zip(("system", "user", "assistant"), ("s", *pair))
            messages = [dict(role=role, content=text) for role, text in chat]
            lines.append(json.dumps(dict(messages=messages)) + "\n")
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    write("synth_train", [("one", "x"), ("two", "y")])
    write("turk_train", zip(("eins", "zwei"), turk_regexes))
    write("synth_test", [("two", "y")])
    write("turk_test", [("drei", "y")])
    return tmp_path


def prepared(folder, monkeypatch, capsys):
    """Run prepare.py on a folder, writing into it: (exit code, what it printed)."""
    monkeypatch.setattr(prepare, "OUT", folder)
    monkeypatch.setattr(sys, "argv", ["prepare.py", f"--input={folder}"])
    try:
        prepare.main()
        return 0, capsys.readouterr().out
    except SystemExit as stop:
        return stop.code, capsys.readouterr().err


def test_prepare_writes_pairs_and_aligned_views_and_counts_the_leak(tmp_path, monkeypatch, capsys):
    code, said = prepared(folder_of(tmp_path), monkeypatch, capsys)
    assert code == 0
    assert "synth: 2 + 1 pairs" in said and "1 descriptions and 1 regexes" in said
    assert "0 descriptions and 1 regexes" in said
    assert (tmp_path / "synth_train.tsv").read_text() == "one\tx\ntwo\ty\n"
    assert (tmp_path / "views_train.tsv").read_text() == "one\teins\tx\ntwo\tzwei\ty\n"


@pytest.mark.parametrize("spoil, complaint", [
    (lambda folder: folder_of(folder, ("x", "z")), "row 2 holds two different regexes"),
    (lambda folder: (folder / "turk_test.jsonl").unlink(), "cannot read"),
    (lambda folder: (folder / "turk_test.jsonl").write_text("{}\n"), "line 1: no messages"),
    (lambda folder: (folder / "turk_test.jsonl").write_text(""), "is empty"),
    (lambda folder: (folder / "turk_test.jsonl").write_bytes(b"\xff"), "not UTF-8")])
def test_a_bad_folder_is_one_line_and_exit_code_2(spoil, complaint, tmp_path, monkeypatch, capsys):
    spoil(folder_of(tmp_path))
    code, said = prepared(tmp_path, monkeypatch, capsys)
    assert code == 2
    assert complaint in said
    assert said.count("\n") == 1


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data/nlrx is not there")
def test_the_published_files_hold_what_is_said_of_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "OUT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare.py", f"--input={SHARED}"])
    prepare.main()
    monkeypatch.setattr(lab, "FOLDER", tmp_path)
    pairs, test = lab.read("synth_train"), lab.read("synth_test")
    assert (len(pairs), len(test)) == (8000, 2000)
    assert sum(prepare.leaked(pairs, test)) == 39
    # every text fits an arm's sizes, with a vocabulary of the smallest training set
    cfg = lab.Config(view="people")
    tokenizer = lab.vocabulary(lab.views_of(lab.Config(), lab.draw(pairs, 250, 0)[0]))
    packed = lab.pack(tokenizer, lab.views_of(cfg, pairs + test), cfg, "cpu")
    assert packed["regex"].size(1) < cfg.answer_size
    assert "views: 8,000 + 2,000 rows" in capsys.readouterr().out


def test_without_the_files_the_lab_says_which_command_writes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match="prepare.py --input=../shared/data/nlrx"):
        lab.llm_jepa(Flags(fast=True, out=str(tmp_path)))
