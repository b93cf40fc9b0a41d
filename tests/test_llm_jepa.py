"""What can be relied on when two views of a pair are compared, one property a test."""
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from data.nlrx import prepare
from labs import llm_jepa as lab
from labs.arms import Flags
from tests.toy import REGEXES as PAIRS, write_regexes

SHARED = Path(__file__).parents[2] / "shared" / "data" / "nlrx"
TOKENIZER = lab.vocabulary(lab.views_of(lab.Config(), PAIRS))
SMALL = lab.Config(n_layer=2, n_head=2, n_embd=32, top_k=2, pred_layer=1, pred_embd=16, dec_layer=1, dtype="fp32",
                   qa_batch_size=16, vocab_size=TOKENIZER.vocab_size)


def model_of(**changes):
    torch.manual_seed(0)
    return lab.GPT(dataclasses.replace(SMALL, **changes))


def batch_of(pairs=PAIRS):
    """Descriptions and regexes, both of several lengths."""
    return lab.pack(TOKENIZER, lab.views_of(SMALL, pairs), SMALL)


def moved(batch, *names):
    """The batch with some of its views moved on by a row: other people's."""
    return batch | {name: batch[name].roll(1, 0) for name in names}


def real(row, model):
    return row[row != model.cfg.pad]


# -- two views, one pass -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("k", [0, 2])
def test_two_views_in_one_pass_are_two_passes(k):
    model, batch = model_of(k=k), batch_of()
    cfg = model.cfg
    together = model.views(batch)
    for i in range(len(PAIRS)):     # alone, without any padding
        text = torch.cat((torch.tensor([cfg.bos]), real(batch["description"][i], model),
                          torch.tensor([cfg.mask] * k).long()))
        code = torch.cat((torch.tensor([cfg.bos]), real(batch["regex"][i], model)))
        for z, view in zip(together, (text, code)):
            torch.testing.assert_close(z[i], model.states(view[None])[0, -1], atol=1e-5, rtol=1e-4)


def test_no_view_sees_the_other():
    model, batch = model_of(k=1), batch_of()
    z_text, z_code = model.views(batch)
    other_text, other_code = model.views(moved(batch, "description", "regex"))
    torch.testing.assert_close(model.views(moved(batch, "regex"))[0], z_text)
    torch.testing.assert_close(model.views(moved(batch, "description"))[1], z_code)
    assert not torch.allclose(other_text, z_text) and not torch.allclose(other_code, z_code)


def test_predictor_tokens_end_the_view_of_the_description_and_stand_nowhere_else(monkeypatch):
    model, batch = model_of(k=3, latent=1.0), batch_of()
    read = []
    monkeypatch.setattr(model, "states", lambda tokens, *how: (
        read.append(tokens), lab.GPT.states(model, tokens, *how))[1])
    model.loss(batch, 0.0)
    packed, both = read
    assert not (packed == model.cfg.mask).any()
    for row, description, regex in zip(both, batch["description"], batch["regex"]):
        bos, mask = [model.cfg.bos], [model.cfg.mask]
        assert real(row, model).tolist() == (bos + real(description, model).tolist() + mask * 3
                                             + bos + real(regex, model).tolist())


# -- the loss ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("share, progress, there", [(1.0, 0.99, True), (0.0, 0.0, False),
                                                    (0.5, 0.4, True), (0.5, 0.5, False)])
def test_the_loss_asks_for_the_regex_and_for_eos_only_if_told(share, progress, there, monkeypatch):
    model, batch = model_of(eos_in_loss=share), batch_of()
    asked = []
    monkeypatch.setattr(lab.F, "cross_entropy", lambda logits, words: asked.extend(words.tolist()))
    model.token_loss(batch, progress)
    assert asked == [word for regex in batch["regex"] for word in real(regex, model).tolist() + [model.cfg.eos] * there]


def test_without_eos_in_the_loss_its_logit_gets_no_push_upwards():
    def pull(**changes):            # how the loss moves the rate of EOS, everything else equal
        model = model_of(**changes)
        bias = torch.zeros(model.cfg.vocab_size, requires_grad=True)
        model.say = lambda states: states @ model.embed.weight.T + bias
        model.loss(batch_of(), 0.0)[0].backward()
        return bias.grad[model.cfg.eos].item()
    assert pull(eos_in_loss=1.0) < 0 < pull(eos_in_loss=0.0)


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_equal_latents_are_at_distance_0(distance, monkeypatch):
    model, z = model_of(distance=distance), torch.randn(8, 32)
    monkeypatch.setattr(model, "views", lambda *_: (z, z.clone()))
    assert model.latent_loss(None).abs() < 1e-6
    monkeypatch.setattr(model, "views", lambda *_: (z, -z))
    assert model.latent_loss(None) > 1


def test_infonce_wants_the_own_regex_nearer_than_the_others(monkeypatch):
    model, z = model_of(distance="infonce"), torch.eye(8, 32)
    monkeypatch.setattr(model, "views", lambda *_: (z, z))
    near = model.latent_loss(None)
    monkeypatch.setattr(model, "views", lambda *_: (z, z.roll(1, 0)))
    assert near < 0.01 and model.latent_loss(None) > 5


@pytest.mark.parametrize("stop", [True, False])
def test_stop_gradient_stops_the_target_and_only_the_target(stop, monkeypatch):
    model = model_of(stop_gradient=stop)
    guess, target = (torch.randn(8, 32, requires_grad=True) for _ in range(2))
    monkeypatch.setattr(model, "views", lambda *_: (guess, target))
    model.latent_loss(None).backward()
    assert guess.grad.abs().sum() > 0 and (target.grad is None) == stop


@pytest.mark.parametrize("changes, reads", [(dict(latent=1.0), True), (dict(latent=0.0), False),
                                            (dict(latent=1.0, latent_drop=1.0), False)])
def test_the_views_are_read_only_if_they_count(changes, reads, monkeypatch):
    model, read = model_of(**changes), []
    monkeypatch.setattr(model, "views", lambda batch: (read.append(batch), lab.GPT.views(model, batch))[1])
    loss, stats = model.loss(batch_of(), 0.0)
    assert bool(read) == reads == ("latent" in stats)
    torch.testing.assert_close(loss.detach(), stats["token"] + stats.get("latent", 0))


def test_an_mlp_or_predictor_tokens_leave_the_other_weights_as_they_are():
    plain = model_of().state_dict()
    for changed in model_of(mlp=True).state_dict(), model_of(k=3).state_dict():
        assert all(torch.equal(changed[name], value) for name, value in plain.items())


# -- writing -----------------------------------------------------------------------------------------------------------

def test_greedy_with_cache_writes_what_it_writes_without():
    model, batch = model_of(answer_size=12), batch_of()
    with torch.no_grad():
        model.embed.weight *= 20                # of an untrained model: decided, and not all the same
        for row in batch["description"]:
            row = real(row, model)[None]
            tokens = lab.join(model.cfg.pad, model.cfg.bos, row, lab.SEP)
            start = tokens.size(1)
            while tokens.size(1) < start + 12 and tokens[0, -1] != model.cfg.eos:
                best = model.say(model.states(tokens))[0, -1].argmax()
                tokens = torch.cat((tokens, best.view(1, 1)), dim=1)
            assert real(model.write(row)[0], model).tolist() == tokens[0, start:].tolist()


def test_nothing_is_written_after_eos(monkeypatch):
    model = model_of(answer_size=4)
    eos, pad = model.cfg.eos, model.cfg.pad
    monkeypatch.setattr(model, "generate", lambda prompt, n: torch.tensor([[5, eos, 6, eos], [5, 6, 7, 8], [eos] * 4]))
    assert model.write(torch.tensor([[1]] * 3)).tolist() == [[5, eos, pad, pad], [5, 6, 7, 8], [eos, pad, pad, pad]]


def test_padding_in_between_moves_to_the_right():
    rows = lab.join(0, 7, torch.tensor([[1, 2, 0, 0], [1, 0, 0, 0]]), 8, torch.tensor([[3, 0], [3, 4]]), 9)
    assert rows.tolist() == [[7, 1, 2, 8, 3, 9], [7, 1, 8, 3, 4, 9]]


def test_an_atom_is_one_token_and_any_text_comes_back():
    regex = r"\b([A-Z]){3,}.*(dog)"
    tokenizer = lab.vocabulary(dict(regex=[regex] * 2))
    assert [tokenizer.decode([i]) for i in tokenizer.encode(regex)] == [
        r"\b", "(", "[A-Z]", ")", "{3,}", ".*", "(", "dog", ")"]
    assert tokenizer.decode(tokenizer.encode("never seen: Škoda")) == "never seen: Škoda"


# -- scoring -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("said, kind", [("(dog).*", "exact"), ("(dog).*.*", "over"), ("(dog)+.", "same_length"),
                                        ("(dog)", "other"), ("", "other"), ("~((dog).*)", "other")])
def test_wrong_answers_are_sorted(said, kind):
    assert lab.outcome(said, "(dog).*") == kind


def test_leaked_pairs_are_counted_apart():
    train_pairs, test = [("a", "x"), ("b", "y")], [("a", "x"), ("c", "y"), ("d", "z"), ("B", "y")]
    leaks = prepare.leaked(train_pairs, test)
    assert leaks == [True, False, False, False]     # the description decides: a regex may be asked for in other words
    found = lab.score(["x", "y", "zz", "."], test, leaks)
    assert found == dict(exact=1 / 3, over=1 / 3, same_length=1 / 3, other=0.0, prefix=2 / 3, exact_leaked=1.0)


def test_alike_knows_pairs_from_strangers():
    z = torch.eye(4)
    found = lab.alike(z, z, ["x", "y", "z", "x"])
    assert found["paired"] == 1 and found["unpaired"] == 0 and found["r1"] == 1 and found["r1_chance"] == 6 / 16
    assert lab.alike(z, z.roll(1, 0), ["x", "y", "z", "v"])["r1"] == 0


def test_the_table_takes_the_commonest_reading_and_says_nothing_of_a_new_sentence():
    known = [("not a vowel before a number", "~(([aeiou]).*([0-9]))")] * 2
    known += [("not a number before a vowel", "(~([0-9])).*([aeiou])"), ("a letter", "[A-Za-z]")]
    guess = prepare.majority(known)
    assert guess("not a number before a letter") == "~(([0-9]).*([A-Za-z]))"
    assert guess("a vowel or a letter") == ""


# -- a run -------------------------------------------------------------------------------------------------------------

@pytest.fixture
def files(tmp_path, monkeypatch):
    """PAIRS as a training file of which the last three are held out, and three test pairs, one of them a leak."""
    write_regexes(tmp_path)
    monkeypatch.setattr(lab, "FOLDER", tmp_path)
    monkeypatch.setattr(lab, "HELD", 3)
    return tmp_path


def test_a_seed_draws_the_pairs_and_never_those_held_out(monkeypatch):
    monkeypatch.setattr(lab, "HELD", 3)
    few, held = lab.draw(PAIRS, 10, 0)
    more, _ = lab.draw(PAIRS, 20, 0)
    assert more[:10] == few and held == PAIRS[-3:] and not set(more) & set(held) and len(set(more)) == 20
    assert lab.draw(PAIRS, 10, 1)[0] != few
    everything, none = lab.draw(PAIRS, len(PAIRS), 0)
    assert sorted(everything) == sorted(PAIRS) and none == []


def test_the_batches_follow_from_the_seed_whatever_the_arm(files, monkeypatch):
    def batches(**changes):
        seen = []
        monkeypatch.setattr(lab.GPT, "loss", lambda model, batch, progress: (
            seen.append(batch["description"].tolist()), torch.rand(model.cfg.k + 1),
            (model.embed.weight.mean(), {}))[2])
        lab.learn_tokens(dataclasses.replace(SMALL, speak_steps=4, out=str(files), **changes), PAIRS)
        return seen
    first = batches()
    assert batches(k=3, latent=1.0) == first and batches(seed=1) != first
    assert all(first[i] != first[j] for i in range(4) for j in range(i))


def test_what_is_taught_is_learned_with_the_latent_term_on(files):
    cfg = dataclasses.replace(SMALL, latent=1.0, k=1, speak_steps=200, speak_lr=5e-3, out=str(files))
    _, write, look = lab.learn_tokens(cfg, PAIRS)
    said = write([text for text, _ in PAIRS])
    assert sum(words == regex for words, (_, regex) in zip(said, PAIRS)) >= 25      # of 27
    found = look(PAIRS)
    assert found["paired"] > 0.9 and found["paired"] > found["unpaired"] and found["token_loss"] < 0.2


@pytest.mark.parametrize("changes", [dict(), dict(view="people", latent=1.0),
                                     dict(model="encoder-decoder", memory="tokens"),
                                     dict(model="t-jepa", block_size=32, vocab_size=300, stop_gradient=True)])
def test_every_model_is_measured_by_the_same_figures(changes, files):
    cfg = dataclasses.replace(SMALL, size=20, pretrain_steps=1, distill_steps=1, speak_steps=1, batch_size=4,
                              out=str(files / "run"), **changes)
    found = lab.measure(cfg)
    assert {"exact", "prefix", *lab.OUTCOMES, "exact_leaked", "dev", "minutes", "million", "term"} <= set(found)
    assert ("paired" in found) == (cfg.model != "encoder-decoder")
    assert ("token_loss" in found) == (cfg.model == "gpt")
    assert len(json.loads((files / "run" / "said.json").read_text())) == 3 + 3      # the test pairs, those held out


def test_the_view_of_people_is_what_they_said_of_the_same_regex(files):
    views = lab.views_of(lab.Config(view="people"), PAIRS[:2])
    assert views["people"] == [f" people: {text}" for text, _ in PAIRS[:2]]
    model, batch = model_of(view="people", latent=1.0), batch_of()
    batch["people"] = batch["description"].roll(1, 0)
    z_text, z_other = model.views(batch)
    torch.testing.assert_close(z_other, z_text.roll(1, 0))      # k = 0: one text has one latent, whichever view it is
    torch.testing.assert_close(model.views(moved(batch, "regex"))[1], z_other)


# -- the arms ----------------------------------------------------------------------------------------------------------

def test_every_arm_of_a_size_takes_the_same_steps():
    best = dict(latent=2.0, k=3)
    for name, cfg in (lab.square(best) | lab.MAP | lab.ways(best)).items():
        assert cfg.speak_steps == lab.STEPS[cfg.size] * (2 if "twice" in name else 1), name


def test_the_arms_take_what_is_best_on_dev_and_not_on_the_test_set():
    rows = [dict(arm=name, seed=seed, dev=0.5 + 0.1 * (name == "lambda=2 k=3"), exact=name == "lambda=1 k=0")
            for name in lab.MAP for seed in (0, 1)]
    best, chosen = lab.best_of_map(rows, "out")
    assert best == dict(latent=2.0, k=3) and "lambda=2 k=3" in chosen
    groups = lab.groups_of(best)
    latent = [cfg for name, cfg in groups["square"].items() if "latent" in name]
    assert len(latent) == 7 and all((cfg.latent, cfg.k) == (2.0, 3) for cfg in latent)
    assert [(cfg.latent, cfg.k) for name, cfg in groups["ways"].items() if name in ("mse", "drop=.5")] == [
        (2.0, 3), (4.0, 3)]
    plain = lab.groups_of(dict(latent=1.0, k=1))
    assert {name: list(arms) for name, arms in groups.items()} == {name: list(arms) for name, arms in plain.items()}


def test_without_the_map_the_others_do_not_start(tmp_path):
    with pytest.raises(ValueError, match="--arms=map"):
        lab.llm_jepa(Flags(arms="square", out=str(tmp_path), results=str(tmp_path)))
    with pytest.raises(ValueError, match="--arms=mapp"):
        lab.llm_jepa(Flags(arms="mapp", out=str(tmp_path)))


def test_the_map_runs_first_and_a_group_stands_for_its_arms(tmp_path, monkeypatch):
    ran = []

    def run_arms(name, arms, flags, measure):
        ran.append(list(arms))
        return [dict(arm=arm, seed=0, dev=0.5, exact=0.5, prefix=0.5, commit="c") for arm in sum(ran, [])]
    monkeypatch.setattr(lab, "run_arms", run_arms)
    lab.llm_jepa(Flags(arms="250,map,1000 latent", out=str(tmp_path)))
    assert ran == [list(lab.MAP), ["250", "1000 latent"]]


def test_gains_are_differences_of_the_same_seed():
    rows = [dict(arm=arm, seed=seed, exact=exact, prefix=exact, over=0.0)
            for arm, by_seed in {"250": (0.1, 0.5), "250 latent": (0.2, 0.4, 0.9)}.items()
            for seed, exact in enumerate(by_seed)]              # the third seed has no partner
    lines = lab.gains(rows).splitlines()
    assert "| 250 latent | 250 | +0.000 ± 0.141 (1 of 2 seeds) |" in lines[2]
    assert "| 8000 latent | 8000 | not measured | not measured | not measured |" in lines


# -- the files ---------------------------------------------------------------------------------------------------------

def folder_of(tmp_path, turk_regexes=("x", "y")):
    """A folder like the published one, with two training pairs and a test pair."""
    def write(name, pairs):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(dict(messages=[
            dict(role=role, content=text) for role, text in zip(("system", "user", "assistant"), ("s", *pair))])) + "\n"
            for pair in pairs))
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
    assert code == 0 and "synth: 2 + 1 pairs" in said and "1 descriptions and 1 regexes" in said
    assert "0 descriptions and 1 regexes" in said
    assert (tmp_path / "synth_train.tsv").read_text() == "one\tx\ntwo\ty\n"
    assert (tmp_path / "views_train.tsv").read_text() == "one\teins\tx\ntwo\tzwei\ty\n"


@pytest.mark.parametrize("spoil, complaint", [
    (lambda folder: folder_of(folder, turk_regexes=("x", "z")), "row 2 holds two different regexes"),
    (lambda folder: (folder / "turk_test.jsonl").unlink(), "cannot read"),
    (lambda folder: (folder / "turk_test.jsonl").write_text("{}\n"), "line 1: no messages"),
    (lambda folder: (folder / "turk_test.jsonl").write_text(""), "is empty"),
    (lambda folder: (folder / "turk_test.jsonl").write_bytes(b"\xff"), "not UTF-8")])
def test_a_bad_folder_is_one_line_and_exit_code_2(spoil, complaint, tmp_path, monkeypatch, capsys):
    spoil(folder_of(tmp_path))
    code, said = prepared(tmp_path, monkeypatch, capsys)
    assert code == 2 and complaint in said and said.count("\n") == 1


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data/nlrx is not there")
def test_the_published_files_hold_what_is_said_of_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "OUT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare.py", f"--input={SHARED}"])
    prepare.main()
    monkeypatch.setattr(lab, "FOLDER", tmp_path)
    pairs, test = lab.read("synth_train"), lab.read("synth_test")
    assert len(pairs) == 8000 and len(test) == 2000 and sum(prepare.leaked(pairs, test)) == 39
    for kind in "synth", "turk":        # every text fits an arm's sizes, with a vocabulary of the smallest training set
        views = lab.views_of(lab.Config(), lab.draw(lab.read(f"{kind}_train"), 250, 0)[0])
        every = lab.views_of(lab.Config(), lab.read(f"{kind}_train") + lab.read(f"{kind}_test"))
        lab.pack(lab.vocabulary(views), every, lab.Config())
    people = lab.Config(view="people")
    lab.pack(lab.vocabulary(lab.views_of(people, pairs[:1000])), lab.views_of(people, pairs + test), people)
    assert "views: 8,000 + 2,000 rows" in capsys.readouterr().out


def test_without_the_files_the_lab_says_which_command_writes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match="prepare.py"):
        lab.read("synth_train")
