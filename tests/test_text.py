"""What can be relied on with a text of one's own: it is read, its gaps are said, and the figures
say whether anything was learned. The texts are tiny."""
import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch

import data
import evaluate
import report
import sample
import tjepa
import train
from labs.runs import open_run
from labs.text import gpt_fill, greedy_fill
from tests.toy import FLAGS, as_argv, config, weights, write_corpus

TINY = FLAGS | dict(n_embd=16, n_layer=1, top_k=1, pretrain_steps=4, speak_steps=8, eval_every=4)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Few rows in each evaluation: what they are worth is tested with models that know all."""
    hidden, spoken = evaluate.hidden_words, evaluate.spoken_gaps
    monkeypatch.setattr(evaluate, "hidden_words", lambda run, rows=4: hidden(run, 4))
    monkeypatch.setattr(evaluate, "spoken_gaps", lambda run, rows=8: spoken(run, 8))


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Folder of the toy text, and of a run on it through phases 1 and 3, without questions."""
    folder = tmp_path_factory.mktemp("text")
    write_corpus(folder)
    cfg = dataclasses.replace(config(folder, folder / "run"), **TINY, qa="")
    return SimpleNamespace(folder=folder, cfg=cfg, figures=train.run(cfg))


@pytest.fixture(scope="session")
def run(text):
    """The run, opened."""
    return open_run(text.cfg)


def short(text, out, **changes):
    """The Config of another run on the text."""
    return dataclasses.replace(text.cfg, out=str(out), **changes)


def equal(a, b):
    """Are two checkpoints' weights equal, bit by bit?"""
    a, b = weights(a), weights(b)
    return all(torch.equal(a[name], b[name]) for name in b)


# -- training --------------------------------------------------------------------------------------
def test_phases_one_by_one_are_the_whole_run(text, tmp_path, capsys):
    """And phase 2, which has nothing to teach, is skipped with a sentence."""
    train.run(short(text, tmp_path / "whole"))
    assert "phase 2, which teaches answers" in capsys.readouterr().out
    train.run(short(text, tmp_path / "parts", phase="pretrain"))
    train.main(["--phase=speak", f"--out={tmp_path / 'parts'}"])
    assert equal(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("accum", [1, 2])
def test_a_killed_phase_3_resumes_bit_by_bit(text, tmp_path, monkeypatch, accum):
    """The gaps of a step follow from the seed and the step, and the scale of latents is kept."""
    whole = short(text, tmp_path / "whole", accum=accum)
    train.run(whole)
    save = train.save_checkpoint

    def save_and_die(out, checkpoint, *more):
        save(out, checkpoint, *more)
        if (checkpoint["phase"], checkpoint["step"]) == ("speak", 4):
            raise RuntimeError("power failure")
    monkeypatch.setattr(train, "save_checkpoint", save_and_die)
    with pytest.raises(RuntimeError, match="power failure"):
        train.run(dataclasses.replace(whole, out=str(tmp_path / "run")))
    monkeypatch.setattr(train, "save_checkpoint", save)
    train.main(["--resume", f"--out={tmp_path / 'run'}"])
    assert equal(tmp_path / "run", tmp_path / "whole")


def test_phase_3_changes_the_decoder_and_the_scale_alone(text, tmp_path):
    """The encoder is frozen."""
    train.run(short(text, tmp_path / "run", phase="pretrain"))
    before = weights(tmp_path / "run")
    train.run(short(text, tmp_path / "run", phase="speak"))
    after = weights(tmp_path / "run")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "answer_mean", "answer_scale"}


def test_questions_may_follow(text, tmp_path):
    """A run that said gaps is taught answers, and then it answers."""
    train.run(short(text, tmp_path / "run"))
    qa = f"--qa={text.folder / 'qa.tsv'}"
    train.main(["--phase=distill", "--distill_steps=4", qa, f"--out={tmp_path / 'run'}"])
    train.main(["--phase=speak", f"--out={tmp_path / 'run'}"])
    checkpoint = train.load_checkpoint(tmp_path / "run")
    assert "em_DEC" in checkpoint["rows"][-1] and "gap_em" not in checkpoint["rows"][-1]
    assert checkpoint["config"]["echo"] == train.Config.echo        # not that of gaps
    with pytest.raises(ValueError, match="was taught questions"):
        train.run(short(text, tmp_path / "run", phase="speak"))


# -- gaps ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("alone", [False, True])
def test_a_gap_is_whole_words_of_the_row_side_by_side(run, alone):
    """Its words stand in the row where it begins, end with EOS, and another word follows."""
    torch.manual_seed(0)
    gaps = evaluate.draw_gaps(run, run.corpus.train, 32, longest=4, alone=alone)
    pad, eos, begins = run.model.cfg.pad, run.model.cfg.eos, run.model.word_start
    for words, row, begin in zip(gaps.words, gaps.text, gaps.begin.tolist()):
        n = int((words < pad).sum())
        assert 1 <= n <= 4 and words[n] == eos and (words[n + 1:] == pad).all()
        assert torch.equal(words[:n], row[begin:begin + n])
        assert row[begin + n] == pad or begins[row[begin + n]]
        assert begin == 0 or begins[row[begin]]
    assert (len(gaps.words) > 32) != alone


def test_a_gap_is_thought_without_its_words(run):
    """Other words in the gap change the target and not the prediction."""
    tokenizer = run.corpus.tokenizer
    left, right = evaluate.around_gap(tokenizer, "We saw that the moss was ", " again.")
    thoughts = []
    for filler in (0, 9):
        tokens = torch.tensor([left + [filler] + right])
        span_ids = torch.full_like(tokens, run.model.cfg.max_spans)
        span_ids[:, len(left)] = 0
        thoughts.append(run.model.think_gaps(tokens, span_ids, 1))
    assert torch.equal(thoughts[0][0], thoughts[1][0])
    assert not torch.equal(thoughts[0][1], thoughts[1][1])
    asked = evaluate.gap_thought(run, left, 1, right).latent
    torch.testing.assert_close(asked, thoughts[0][0][:, 0])


def test_a_text_without_words_has_gaps_too(text, tmp_path):
    """A genome is one word: there are no whole words to hide, and yet phase 3 runs."""
    torch.manual_seed(0)
    letters = "".join("ACGT"[i] for i in torch.randint(4, (4000,)).tolist())
    (tmp_path / "dna.txt").write_text(letters)
    figures = train.run(short(text, tmp_path / "run", data=str(tmp_path / "dna.txt")))
    assert figures["phase"] == "speak"


# -- figures ---------------------------------------------------------------------------------------
class Oracle:
    """A model that knows each hidden token: its latent is one-hot, predicted and as a target."""

    def __init__(self, cfg, knows=True):
        self.cfg = cfg
        self.knows = knows

    def predict(self, tokens, span_ids, n_removed):
        target = self.target_latents(tjepa.split_spans(span_ids, tokens, n_removed, self.cfg))
        return SimpleNamespace(predicted=target if self.knows else torch.zeros_like(target))

    def target_latents(self, spans):
        """The latent of the one hidden token of each row, which comes last: (B, 1, V)."""
        return torch.nn.functional.one_hot(spans.tokens[:, -1:], self.cfg.vocab_size).float()


@pytest.mark.parametrize("knows", [True, False])
def test_the_hidden_word_has_the_lowest_energy_if_the_model_knows_it(run, knows):
    """One that knows nothing loses all ties, and with the frequencies it is the unigram control."""
    cfg = dataclasses.replace(run.model.cfg, mlm=0.0)
    held_out = evaluate.hide_words(run, run.corpus.val, 64)
    asked = run._replace(model=Oracle(cfg, knows))
    scores = evaluate.word_scores(asked, held_out, size=100)
    found = evaluate.hit_and_rank(scores["energy"], held_out.own, "energy")
    assert found["word_energy_hit1"] == knows and (found["word_energy_rank"] == 1) == knows
    # the hidden word is a candidate, whole, with text on both sides
    hidden = held_out.tokens.gather(1, held_out.place)[:, 0]
    assert torch.equal(held_out.words[held_out.own], hidden)
    begins = torch.tensor(run.corpus.tokenizer.word_start)
    after = held_out.tokens.gather(1, held_out.place + 1)[:, 0]
    assert begins[hidden].all() and begins[after].all() and (held_out.place > 0).all()


def test_speech_is_compared_with_the_words_of_its_own_gap(run, monkeypatch):
    """Said right it is 1, and with the thoughts of other gaps it is not."""
    torch.manual_seed(0)
    gaps = evaluate.draw_gaps(run, run.corpus.val, 8, longest=3, alone=True)
    answers = [[i for i in row if i < run.model.cfg.pad] for row in gaps.words.tolist()]

    def say_tokens(run, thoughts):
        known = torch.cat((gaps.predicted, gaps.target))
        which = torch.cdist(thoughts.latent, known).argmin(1) % len(answers)
        return [answers[i] for i in which.tolist()]
    monkeypatch.setattr(evaluate, "say_tokens", say_tokens)
    figures = evaluate.spoken_gaps(run)
    assert figures["gap_em"] == figures["gap_f1"] == figures["gap_em_echo"] == 1
    assert figures["gap_em_shuffled"] < 0.5 and figures["gap_em_common"] < 0.5
    assert evaluate.token_f1([1, 2, 2], [2, 3, 4]) == pytest.approx(1 / 3)
    assert evaluate.token_f1([], [2]) == 0


def test_a_tie_among_candidates_is_lost():
    """Else latents that collapsed to a point would always be right."""
    found = evaluate.hit_and_rank(torch.zeros(3, 10), torch.tensor([0, 4, 9]), "x")
    assert found == {"word_x_hit1": 0.0, "word_x_hit5": 0.0, "word_x_rank": 10.0}
    scores = torch.eye(10)[:3] - 0.1 * torch.arange(10)
    found = evaluate.hit_and_rank(scores, torch.tensor([0, 1, 9]), "x")
    assert found == {"word_x_hit1": pytest.approx(2 / 3), "word_x_hit5": pytest.approx(2 / 3),
                     "word_x_rank": 1.0}


@pytest.mark.parametrize("energy, said", [(0.05, True), (0.07, True), (0.2, False)])
def test_a_run_at_chance_is_told_so(energy, said):
    """Healthy latents alone do not mean that anything was learned."""
    figures = dict(word_choices=100, word_energy_hit5=energy)
    assert bool(report.advice(figures)) == said
    # energy among the commonest words may be frequency alone: the figure without it decides
    figures = dict(word_choices=100, word_energy_hit5=0.2, word_similar_energy_hit5=energy)
    assert bool(report.advice(figures)) == said


@pytest.mark.parametrize("n_words, knows", [(250, True), (250, False), (150, True)])
def test_words_of_similar_frequency_are_those_after_the_commonest(n_words, knows):
    """Such a word is found by one who knows it; where there are not enough, nothing is measured."""
    flags = [True] * n_words + [False] * 4
    tokenizer = SimpleNamespace(word_start=flags, is_word=flags, pad=n_words, eos=n_words + 2)
    # word i occurs n_words - i times and more
    stream = torch.cat([torch.arange(n) for n in range(1, n_words + 1)])
    stream = stream[torch.randperm(len(stream), generator=torch.Generator().manual_seed(0))]
    text = data.Text(stream.numpy(), 16, tokenizer, "text")
    cfg = tjepa.Config(vocab_size=n_words + 4, block_size=16, mlm=0.0)
    run = SimpleNamespace(corpus=SimpleNamespace(train=text, val=text, tokenizer=tokenizer),
                          model=Oracle(cfg, knows), device="cpu")
    figures = evaluate.similar_words(run, 32)
    if n_words < 200:
        assert figures == {}
        return
    hidden = evaluate.hide_words(run, text, 32, first=100)
    assert hidden.words.tolist() == list(range(100, 200))
    assert figures["word_similar_energy_hit1"] == knows
    # the commonest of them are no more than twice as common as the rarest
    assert figures["word_similar_unigram_hit5"] < 0.3


@pytest.mark.parametrize("sentence, word", [
    ("春天来了，花开了。我们去公园看花，花很美。", "花"),
    ("แมวกินปลา หมากินข้าว แมวกินข้าว หมากินปลา ", "กิน"),
    ("हिन्दी में किताब पढ़ो। किताब में हिन्दी लिखो। ", "में"),
    ("Кот видит дом, и кот видит сад. ", "видит"),
    ("return self.total + self.count\n", "self")])
def test_common_words_are_found_in_every_script(sentence, word, tmp_path):
    """Also where no blanks stand between words, and where vowels are combining marks."""
    (tmp_path / "text.txt").write_text(40 * sentence, encoding="utf-8")
    cfg = train.Config(data=str(tmp_path / "text.txt"), vocab_size=600, block_size=8)
    corpus = data.load(cfg)
    ids, counts = data.frequent_words(corpus.train.tokens, corpus.tokenizer, 100)
    words = [corpus.tokenizer.decode([i]).strip() for i in ids.tolist()]
    assert any(word in found for found in words) and counts[0] >= counts[-1] > 0


@torch.no_grad()
def test_scaled_embeddings_reach_the_target():
    """Share of the latents' variance that the token itself explains, before any training."""
    cfg = tjepa.Config(vocab_size=54, n_layer=2, top_k=2)
    tokens = torch.randint(50, (64, 64), generator=torch.Generator().manual_seed(0))
    explained = []
    for scale in (1.0, 50.0):
        torch.manual_seed(0)
        model = tjepa.TJEPA(dataclasses.replace(cfg, embed_scale=scale), [True] * 54)
        latents = model.encode(tokens).flatten(0, 1)                        # (N, C)
        latents -= latents.mean(0)
        within = sum(((rows - rows.mean(0)) ** 2).sum() for rows in
                     (latents[tokens.flatten() == token] for token in range(50)))
        explained.append(1 - within / (latents ** 2).sum())
    assert explained[0] < 0.5 and explained[1] > 0.9


@pytest.mark.parametrize("loss, found, learned", [
    ("mse", 1, True), ("mse", 3, False), ("infonce", 3, True), ("infonce", 0, False)])
def test_infonce_is_not_called_unlearned_for_the_length_of_its_predictions(run, loss, found,
                                                                           learned):
    """Predictions three times as long as their targets have R2 below 0, and are all right."""
    torch.manual_seed(0)
    target = tjepa.norm(torch.randn(64, 8, 16))
    predicted = found * target if found else target.roll(1, 0)
    prediction = SimpleNamespace(predicted=predicted, target=target,
                                 span_mask=torch.ones(64, 8, dtype=torch.bool))
    cfg = dataclasses.replace(run.model.cfg, loss=loss)
    model = SimpleNamespace(cfg=cfg, word_start=run.model.word_start, encode=torch.nn.Embedding(
        cfg.vocab_size, 16), predict=lambda tokens, spans: prediction)
    figures = evaluate.evaluate_text(run._replace(model=model), 64)
    assert figures["health"] == ("healthy" if learned else "unlearned")
    assert ("val_r2" in figures) == (loss == "mse")


# -- the text --------------------------------------------------------------------------------------
def test_settings_follow_from_the_size_of_the_text_and_flags_win(text, capsys):
    """Facts and questions keep their own settings."""
    given = dict(data=text.cfg.data, pretrain_lr=7e-4)
    cfg = train.resolve(given)
    printed = capsys.readouterr().out
    assert (cfg.vocab_size, cfg.pretrain_lr) == (train.TEXT_SIZES[0][1], 7e-4)
    assert "--vocab_size=512" in printed and "pretrain_lr" not in printed
    alone = train.resolve(given | dict(recipe="latent"))
    assert (alone.mlm, alone.pretrain_lr) == (0, 7e-4)
    with_questions = train.resolve(dict(data=text.cfg.data, qa="qa.tsv"))
    assert with_questions.vocab_size == train.Config.vocab_size
    assert train.resolve({}) == train.Config()


def test_a_script_of_its_own_gets_a_token_for_each_common_character(tmp_path):
    """Else characters are cut into bytes."""
    (tmp_path / "text.txt").write_text("".join(map(chr, range(0x4e00, 0x4e80))) * 10)
    cfg = train.resolve(dict(data=str(tmp_path / "text.txt")))
    assert cfg.vocab_size == train.TEXT_SIZES[0][1] + 128


def test_no_text_asks_for_more_tokens_than_16_bits_have(tmp_path):
    characters = "".join(map(chr, range(0x20000, 0x20000 + 100_000)))
    (tmp_path / "text.txt").write_text(10 * characters, encoding="utf-8")
    cfg = train.resolve(dict(data=str(tmp_path / "text.txt")))
    assert cfg.vocab_size == 2 ** 16


def test_a_folder_is_read_in_order_and_no_row_crosses_a_file(tmp_path):
    """<|endoftext|> divides documents like the end of a file."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_text(30 * "second. ")
    (folder / "a.txt").write_text(30 * "first. " + "<|endoftext|>" + 30 * "inside. ")
    (folder / "notes.md").write_text("left out")
    cfg = train.Config(data=str(folder), vocab_size=300, block_size=8)
    corpus = data.load(cfg)
    stream = corpus.tokenizer.decode(corpus.train.tokens.tolist())
    assert stream.index("first") < stream.index("inside") < stream.index("second")
    rows = corpus.train.rows(range(len(corpus.train.starts)))
    kinds = [{word for word in ("first", "inside", "second") if word in said}
             for said in map(corpus.tokenizer.decode, rows.tolist())]
    assert max(map(len, kinds)) == 1 and set().union(*kinds) == {"first", "inside", "second"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="folder without .txt files"):
        data.load(dataclasses.replace(cfg, data=str(tmp_path / "empty")))


@pytest.mark.parametrize("content", ["", 9 * "The moss is green. "])
def test_documents_of_one_token_are_no_text(tmp_path, content):
    """No row of them could lose a token and keep one; the held-out part counts too."""
    path = tmp_path / "text.txt"
    path.write_text(content + 300 * "<|endoftext|>a")
    with pytest.raises(ValueError, match="no document between two"):
        data.load(train.Config(data=str(path), vocab_size=300, block_size=8))


def test_a_text_too_small_for_its_vocabulary_is_told_so(text, capsys):
    """The vocabulary shrinks by itself."""
    data.load(dataclasses.replace(text.cfg, vocab_size=5000))
    assert "too small for --vocab_size=5000" in capsys.readouterr().out


# -- sample.py -------------------------------------------------------------------------------------
def test_a_filling_that_is_always_right_has_exact_match_1(run, monkeypatch):
    """The control of labs.text: gaps of one, two and three tokens are read at the right places."""
    def knows(p):
        """Logits of a head that knows each removed token."""
        ids = p.word_ids.clamp(min=0)
        return torch.nn.functional.one_hot(ids, run.model.cfg.vocab_size).float()
    monkeypatch.setattr(run.model, "word_logits", knows, raising=False)
    assert greedy_fill(run, 64) == dict(gap_em=1.0, gap_f1=1.0)


def test_a_gpt_that_is_always_right_has_exact_match_1(run):
    """It has no predictor: the gaps are those of a T-JEPA, and it reads them at their places."""
    cfg = run.model.cfg
    model = SimpleNamespace(
        cfg=cfg,
        after_bos=lambda tokens: tokens,
        # the state before a token knows it
        states=lambda tokens: torch.nn.functional.one_hot(tokens, cfg.vocab_size).float(),
        say=lambda states: states)
    assert gpt_fill(run._replace(model=model), 64) == dict(gap_em=1.0, gap_f1=1.0)


@pytest.fixture
def ask(text, capsys):
    """ask(*flags) -> what is printed, without the first line, of the device."""
    def ask(*flags):
        capsys.readouterr()
        sample.main([f"--out={text.cfg.out}", *flags])
        return capsys.readouterr().out.split("\n", 1)[1]
    return ask


@pytest.fixture
def fails(capsys):
    """fails(*flags) -> the error: the only line on stderr, with exit code 2."""
    def fails(*flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            sample.main(list(flags))
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1
        return lines[0]
    return fails


def test_a_gap_is_filled_and_the_lowest_energy_comes_first(ask):
    """The last line is the text with the best filling in it."""
    lines = ask("--fill=We saw that the moss was [...] again.").splitlines()
    energies = [float(line.split()[0]) for line in lines[1:-1]]
    best = lines[1].split(maxsplit=1)[1]
    assert energies == sorted(energies)
    assert lines[-1] == f"We saw that the moss was [{best}] again."


def test_fillings_are_drawn_by_temperature_and_follow_the_seed(ask):
    """As many as --n, equal ones shown once."""
    flags = ("--fill=The [...] is green.", "--temperature=3", "--n=12")
    assert ask(*flags, "--seed=1") == ask(*flags, "--seed=1") != ask(*flags, "--seed=2")
    assert 3 < len(ask(*flags).splitlines()) <= 14


def test_going_on_adds_so_many_tokens_beyond_a_row(ask, run):
    """The text stays, and a context longer than a row is cut on the left."""
    begin = "The moss is green. We saw that the moss"
    assert 3 * 50 > run.cfg.block_size
    said = ask(f"--go_on={begin}", "--length=50").rstrip("\n")
    assert said.startswith(begin)
    added = run.corpus.tokenizer.encode(said[len(begin):])
    # a byte that is no character is shown as one of three bytes
    assert 20 <= len(added) <= 3 * 50
    assert ask(f"--go_on={begin}", "--length=50", "--seed=5").rstrip("\n") == said      # greedy


def test_a_conversation_fills_gaps_and_goes_on(ask, monkeypatch):
    """A text that cannot be filled is no reason to stop."""
    lines = iter(["The moss is [...].", "[...] [...]", "The moss", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    said = ask("--length=5")
    assert re.search(r"The moss is \[.*\]\.", said) and said.splitlines()[-1].startswith("The moss")


@pytest.mark.parametrize("flag, words", [
    ("--fill=no gap", "exactly one gap"), ("--fill=[...] and [...]", "exactly one gap"),
    ("--fill=[...]", "with text around it"), ("--go_on= ", "is empty"),
    ("--fill=" + 40 * "moss " + "[...]", "shorten it")])
def test_a_text_that_cannot_be_said_is_refused(text, fails, flag, words):
    """One line names the flag and the remedy."""
    assert words in fails(f"--out={text.cfg.out}", flag)


def test_fillings_have_an_end(text, fails):
    """Each takes a step of the predictor and several of the decoder."""
    said = fails(f"--out={text.cfg.out}", "--fill=The [...] is", "--temperature=1", "--n=1001")
    assert "--n=1001: at most 1000" in said


def test_a_run_that_cannot_say_gaps_says_what_to_do(text, world, tmp_path, fails):
    """After phase 1 alone, and where answers were taught."""
    train.run(short(text, tmp_path / "run", phase="pretrain"))
    assert "--phase=speak" in fails(f"--out={tmp_path / 'run'}", "--go_on=The moss")
    assert "answers questions" in fails(f"--out={world.cfg.out}", "--fill=The [...] is")


def test_facts_are_added_to_answers_alone(text, tmp_path, capsys):
    """A run that says gaps was taught none: it says which phase to run."""
    (tmp_path / "new.tsv").write_text("Who?\tme\n")
    with pytest.raises(SystemExit):
        train.main(["--phase=teach", f"--qa={tmp_path / 'new.tsv'}", f"--out={text.cfg.out}"])
    assert "run --phase=distill --qa=FILE first" in capsys.readouterr().err


def test_going_on_from_a_row_of_four_tokens(text, tmp_path, capsys):
    """The text before the gap is cut to what is left of a row, however short that is."""
    train.run(short(text, tmp_path / "run", block_size=4))
    capsys.readouterr()
    sample.main([f"--out={tmp_path / 'run'}", "--go_on=We saw that the moss was", "--length=9"])
    assert "We saw that the moss was" in capsys.readouterr().out


@pytest.mark.parametrize("flag, words", [
    ("--memory=tokens", "--memory=thought"), ("--teacher=ckpt:out/x", "--qa=FILE")])
def test_what_needs_questions_is_refused_without_them(text, tmp_path, capsys, flag, words):
    """Before anything is written."""
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        train.main([*as_argv(FLAGS), f"--data={text.cfg.data}", f"--out={out}", flag])
    assert words in capsys.readouterr().err and not out.exists()
