"""What the arms of the facts lab may and may not differ in, and that its controls are controls. Seconds of training."""
import dataclasses
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import evaluate
import tjepa
import train
from labs import arms, facts, teachers
from tests.toy import FLAGS, PAIRS, write_corpus


@pytest.fixture(scope="module")
def corpus():
    return data.load(train.Config())


@pytest.fixture(scope="module")
def questions(corpus):
    return data.Questions(corpus.qa, corpus.tokenizer, 64, 24, "cpu")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """An arm on the toy world, and its folder."""
    folder = tmp_path_factory.mktemp("facts")
    write_corpus(folder)
    return folder, facts.Config(**FLAGS | dict(data=str(folder / "text.txt"), qa=str(folder / "qa.tsv")))


def said(text, tokenizer):
    """A `data.Text` as one string."""
    return tokenizer.decode(text.tokens.tolist())


# -- the arms ----------------------------------------------------------------------------------------------------------

def test_arms_share_the_phases_that_they_copy():
    """What an arm changes belongs to the phase that it begins with, or a later one."""
    early = ("text pretrain_steps pretrain_lr batch_size mask_ratio target loss sigreg vicreg mlm top_k target_norm "
             "ema_half_life pred_layer pred_embd n_layer n_embd shift").split()
    second = "teacher distill_steps distill_lr question_drop qa_batch_size".split()
    for name, cfg in facts.ARMS.items():
        if cfg.start:
            source = facts.ARMS[cfg.start]
            kept = early + (second if cfg.phase == "speak" else [])
            assert all(getattr(cfg, field) == getattr(source, field) for field in kept), name
            assert cfg.phase in ("distill", "speak") or cfg.way == "gpt", name
            assert not source.start, name           # one copy, not a chain of them


def test_arms_read_and_are_taught_as_much_as_their_names_say():
    def read(cfg):
        return cfg.pretrain_steps * cfg.batch_size

    def taught(cfg):
        return cfg.distill_steps * cfg.qa_batch_size
    times = {"three times as long": 3, "reads 7 times as much": 7}
    for name, cfg in facts.ARMS.items():
        if cfg.pretrain_steps:
            assert read(cfg) == next((n for words, n in times.items() if words in name), 1) * read(train.Config()), name
        if "lever" not in name and "distill_steps" not in name:
            assert taught(cfg) == (8 if "taught 8 times" in name else 1) * taught(train.Config()), name


def test_only_levers_run_on_the_seeds_that_choose():
    for name, cfg in facts.ARMS.items():
        assert (cfg.shift >= 10) == name.startswith("lever "), name


def test_every_arm_stands_in_a_table_and_no_table_asks_for_another():
    shown = {name for part, _ in facts.ALL.values() for name in part}
    assert shown == set(facts.ARMS)


def test_an_arm_that_others_begin_with_runs_first_and_once(tmp_path, monkeypatch):
    ran = []

    def measure(cfg):
        ran.append(Path(cfg.out).name)
        Path(cfg.out).mkdir(parents=True)
        return dict(em_LAT_heldout=0.5)
    monkeypatch.setattr(facts, "measure", measure)
    facts.facts(arms.Flags(seeds=2, out=str(tmp_path), results=str(tmp_path), arms="teacher gpt,n_slots=1,recipe=latent"))
    assert sorted(ran[:4]) == ["GPT_0", "GPT_1", "recipe=latent_0", "recipe=latent_1"] and len(ran) == len(set(ran)) == 8


def test_an_arm_that_fails_stops_none_that_does_without_it(tmp_path, monkeypatch):
    ran = []

    def measure(cfg):
        ran.append(Path(cfg.out).name)
        if "GPT" in cfg.out:
            raise RuntimeError("out of memory")
        Path(cfg.out).mkdir(parents=True)
        return {}
    monkeypatch.setattr(facts, "measure", measure)
    page = tmp_path / "page.md"
    page.write_text("<!-- facts -->\nmeasured\n<!-- /facts -->")
    with pytest.raises(RuntimeError, match="out of memory"):
        facts.facts(arms.Flags(seeds=1, out=str(tmp_path), results=str(tmp_path), arms="teacher gpt,echo=0", table=str(page)))
    assert "echo=0_0" in ran and "\nmeasured\n" in page.read_text()           # no page loses rows to a failure


def test_a_teacher_from_outside_comes_last_and_without_its_file_the_rest_is_shown(tmp_path, monkeypatch, capsys):
    ran, outside = [], "default teacher all-MiniLM-L6-v2 (384 wide)"

    def measure(cfg):
        ran.append(Path(cfg.out).name)
        if cfg.teacher == facts.OUTSIDE:
            data.read_vectors(tmp_path / cfg.teacher, ["Paris"])
        Path(cfg.out).mkdir(parents=True)
        return dict(em_LAT_heldout=0.625)
    monkeypatch.setattr(facts, "measure", measure)
    with pytest.raises(ValueError, match="vectors.npz"):
        facts.facts(arms.Flags(seeds=1, out=str(tmp_path), results=str(tmp_path), arms=f"{outside},GPT"))
    assert ran == ["default_0", "GPT_0", f"{outside}_0"] and "0.625" in capsys.readouterr().out


def test_what_is_missing_is_named(tmp_path):
    cfg = dataclasses.replace(facts.ARMS["n_slots=1"], out=str(tmp_path / "n_slots=1_0"))
    with pytest.raises(ValueError, match="recipe=latent_0/distill/ckpt.pt is missing: run --arms='recipe=latent'"):
        facts.measure(cfg)
    with pytest.raises(ValueError, match="--arms=nothing: this lab has default"):
        facts.facts(arms.Flags(arms="nothing", out=str(tmp_path)))


def test_shared_phases_are_bit_identical_and_the_decoder_is_new(tmp_path):
    facts.facts(arms.Flags(fast=True, out=str(tmp_path), arms="both echo beside a question,n_slots=1"))
    folder = tmp_path / "facts-fast"
    first, last, other = (train.load_checkpoint(folder / name)["model"] for name in (
        "recipe=latent_0/distill", "recipe=latent_0", "n_slots=1_0"))
    frozen = [name for name in first if not name.startswith("decoder.")]
    assert all(torch.equal(first[name], last[name]) and torch.equal(first[name], other[name]) for name in frozen)
    assert first["decoder.slots.weight"].shape != other["decoder.slots.weight"].shape
    rows = arms.run_arms("facts", facts.ARMS, arms.Flags(fast=True, out=str(tmp_path), seeds=0))
    assert {row["arm"] for row in rows} == {"recipe=latent", "n_slots=1", "both echo beside a question"}
    assert all("em_LAT_heldout" in row for row in rows)
    latent = next(row for row in rows if row["arm"] == "recipe=latent")
    asked = {figure for part, columns in facts.ALL.values() if "recipe=latent" in part for figure in columns.values()}
    assert not asked - set(latent)


# -- phase 2: what is taught -------------------------------------------------------------------------------------------

def test_shuffled_facts_have_the_answers_of_others_and_all_of_them(questions):
    wrong = facts.crossed(questions, seed=0)
    pairs = {(facts.fact_of(row), own, other) for row, own, other in zip(
        questions.rows, questions.answer_of.tolist(), wrong.answer_of.tolist()) if row.split in ("DEC", "LAT")}
    assert len(pairs) == len({fact for fact, _, _ in pairs}) == 224         # one wrong answer a fact, in all phrasings
    assert sorted(own for _, own, _ in pairs) == sorted(other for _, _, other in pairs)
    assert sum(own == other for _, own, other in pairs) < 12                # continents, mostly
    assert wrong.rows is questions.rows and not torch.equal(wrong.answer_of, questions.answer_of)


def taught(questions):
    return {facts.fact_of(questions.rows[i]) for i in questions.where("DEC", "LAT", phrasing="trained").tolist()}


def test_a_and_b_are_halves_and_b_is_taught_without_a(questions):
    halves, a, b = facts.in_halves(questions, 0.0, seed=0)
    assert taught(a) == taught(halves["A"]) and taught(b) == taught(halves["B"])
    assert not taught(a) & taught(b) and taught(a) | taught(b) == taught(questions)
    assert abs(len(taught(a)) - len(taught(b))) <= 1
    assert {row.split for half in halves.values() for row in half.rows} == {"DEC", "LAT"}


@pytest.mark.parametrize("replay", [0.1, 1.0])
def test_replay_is_a_share_of_as_questions(questions, replay):
    halves, a, b = facts.in_halves(questions, replay, seed=0)
    first = taught(a)
    again = [row for row in (b.rows[i] for i in b.where("DEC", "LAT").tolist()) if facts.fact_of(row) in first]
    assert len(again) / len(halves["A"].rows) == pytest.approx(replay, abs=0.03)
    assert len(b.where("DEC", "LAT")) == len(again) + len(halves["B"].rows)


def test_letters_and_codes_are_vectors_of_a_teacher(questions, tmp_path):
    for name, width in ("letters", 300), ("random", 128):
        teachers.save(tmp_path / "v.npz", questions.answers, getattr(teachers, name)(questions.answers))
        found = data.read_vectors(tmp_path / "v.npz", questions.answers)
        assert found.shape == (len(questions.answers), width)
        assert torch.equal(found, data.read_vectors(tmp_path / "v.npz", questions.answers))
        assert torch.pdist(found).min() > 0                 # no two answers are the same
    spelled = teachers.letters(["Paris", "Parish", "Rome"])
    assert spelled[0] @ spelled[1] > 0.5 > abs(spelled[0] @ spelled[2])


def test_the_sentence_encoder_of_the_readme_makes_vectors_that_can_teach(tmp_path, monkeypatch, questions):
    class SentenceTransformer:
        """The interface of the real one, with vectors made offline."""
        def __init__(self, name):
            pass

        def encode(self, texts):
            return teachers.letters(texts, 384).astype(np.float32)
    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(
        SentenceTransformer=SentenceTransformer))
    code = re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert data.read_vectors("vectors.npz", questions.answers).shape == (213, 384)


# -- phase 3: what is read ---------------------------------------------------------------------------------------------

def thoughts(n=40, width=32):
    torch.manual_seed(0)
    return tjepa.Thought(torch.randn(n, width), torch.randn(n, 5, width), torch.ones(n, 5, dtype=torch.bool))


def test_memory_drop_hides_token_latents_and_never_the_thought():
    torch.manual_seed(0)
    cfg = tjepa.Config(vocab_size=60, n_embd=32, pred_embd=16, n_head=2, memory="both", memory_drop=0.5)
    decoder, some = tjepa.Decoder(cfg), thoughts(400)
    memory, mask = decoder.memory(some, 0.5)
    slots, tokens = mask[:, 0, 0].split((cfg.n_slots, 5), dim=1)
    assert slots.all() and torch.equal(tokens.all(1), tokens.any(1))
    assert tokens.all(1).float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert decoder.memory(some)[1].all()                    # when it speaks, all is there


def test_speak_loss_drops_as_the_flag_says(monkeypatch):
    model = tjepa.TJEPA(tjepa.Config(vocab_size=60, n_embd=32, pred_embd=16, n_head=2, memory="both", memory_drop=0.25),
                        torch.ones(60))
    asked, real = [], model.decoder.memory
    monkeypatch.setattr(model.decoder, "memory", lambda thought, drop=0.0: asked.append(drop) or real(thought, drop))
    model.speak_loss(thoughts(), torch.randint(50, (40, 6)), torch.randn(40, 32), 0.5)
    list(model.speak(thoughts()))
    assert asked == [0.25, 0.0]


@pytest.mark.parametrize("what", ["question", "nothing"])
def test_beside_an_echo_stands_no_token_of_its_own(what):
    heard, some, cfg = [], thoughts(), facts.Config(memory="both", beside=what, echo=0.75)
    facts.beside(cfg, lambda thought, *rest: heard.append((thought, rest)), some, "words")
    (thought, rest), = heard
    assert rest == ("words",) and torch.equal(thought.latent, some.latent)
    assert torch.equal(thought.context[:10], some.context[:10]) and thought.real[:10].all()     # questions keep theirs
    own = (thought.context[10:, None] == some.context[None, :10]).all((2, 3))                   # (30, 10)
    assert thought.real[10:].all() and own.any(1).all() if what == "question" else not thought.real[10:].any()
    assert some.real.all()                                  # the pool stays as it is


def test_an_echo_errs_as_a_question_of_the_batch_does():
    heard, some, latents = [], thoughts(), torch.randn(40, 32)
    before = some.latent.clone()
    facts.erring(facts.Config(echo=0.75), lambda thought, *rest: heard.append((thought.latent, rest)), some, "w" * 40,
                 latents, 0.5)
    (latent, rest), = heard
    assert rest == ("w" * 40, latents, 0.5) and torch.equal(latent[:10], before[:10])
    errors = torch.cdist(latent[10:] - before[10:], (before - latents)[:10])                    # (30, 10)
    assert errors.amin(1).max() < 1e-2 and len(errors.argmin(1).unique()) > 5
    assert torch.equal(some.latent, before)                 # the pool stays as it is


def test_thoughts_of_dropped_questions_are_for_training_alone(tmp_path, monkeypatch):
    drops, think = [], tjepa.TJEPA.think
    monkeypatch.setattr(tjepa.TJEPA, "think",
                        lambda model, tokens, drop=0.0: drops.append(drop) or think(model, tokens, drop))
    monkeypatch.setitem(facts.ARMS, "errors", facts.spoken(errors=0.3))
    facts.facts(arms.Flags(fast=True, out=str(tmp_path), arms="errors"))
    assert 0.3 in drops and set(drops[drops.index(0.3):]) == {0.0, 0.3} and drops[-1] == 0.0


# -- what phase 1 reads, and what is asked of it -----------------------------------------------------------------------

@pytest.mark.parametrize("text", ["wordings", "questions"])
def test_no_text_holds_a_held_out_wording(corpus, text):
    cfg = facts.Config(text=text)
    words = said(facts.retold(cfg, corpus), corpus.tokenizer)
    held = [item.statement.replace("{a}", item.answer) for item in corpus.cloze[::9]]
    assert not [statement for statement in held if statement in words]
    assert sum(statement.split()[-1] in words for statement in held) > 30      # it does speak of these facts


def test_the_text_with_questions_asks_dec_alone(corpus):
    words = said(facts.retold(facts.Config(text="questions"), corpus), corpus.tokenizer)
    found = [bit for bit in words.split(".") if "?" in bit]
    asked = {row.question: row.split for row in corpus.qa}
    splits = [asked.get(bit[:bit.index("?") + 1].strip()) for bit in found]
    assert set(splits) <= {"DEC", None} and splits.count("DEC") > 2000      # None: the one wording of two sentences
    held = [row.question for row in corpus.qa if row.phrasing == "heldout"]
    assert not [question for question in held if question in words]


@pytest.mark.parametrize("told", ["DEC", "DEC LAT"])
def test_the_gpt_is_told_the_answers_that_it_says_it_is_told(corpus, questions, told):
    heard = set()

    class Listener:
        """In place of a GPT: keeps what it is asked to say."""
        cfg = dataclasses.replace(tjepa.Config(), vocab_size=corpus.tokenizer.vocab_size)

        def __call__(self, tokens, goals):
            heard.update(corpus.tokenizer.decode([i for i in row if i >= 0]).strip() for row in goals.tolist())
            return None, None
    cfg = facts.Config(told=told, qa_batch_size=512)
    loss_at = facts.answering(types.SimpleNamespace(model=Listener(), device="cpu"), questions, cfg)
    for _ in range(30):
        loss_at(0.0)
    def answers(*splits):
        return {row.answer for row in corpus.qa if row.split in splits}
    assert heard == answers(*told.split()) and (heard >= answers("LAT")) == ("LAT" in told)


def test_the_commonest_answer_is_right_where_it_is_common_and_nowhere_else(tmp_path, corpus):
    figures = facts.constant(facts.Config(out=str(tmp_path / "x_0")))
    assert 0.05 < figures["em_LAT_heldout"] < 0.2 and 0.05 < figures["em_TXT_heldout"] < 0.2
    fact = {(row.relation, row.subject): row.answer for row in corpus.qa if row.split == "DEC"}
    assert figures["em_DEC_heldout"] > 1 / len(set(fact.values()))      # it can say DEC answers alone, one a relation
    assert figures["em_DEC_heldout"] < 0.3


def test_a_masked_lm_is_asked_for_tokens(corpus):
    tokens = torch.full((2, 12), 5)
    spans = torch.full((2, 12), tjepa.Config().max_spans).index_fill(1, torch.tensor([4, 5]), 0)
    for name, tokens_alone in ("masked LM", True), ("default", False), ("recipe=latent", False):
        cfg = facts.plain(facts.ARMS[name])
        model = train.build(cfg, corpus.tokenizer)
        asked = facts.as_trained(train.Run(cfg, model, corpus, "cpu", None)).model.energy(tokens, spans)
        assert (asked > 5).all() == tokens_alone, name      # near ln 2,048 by chance; a latent error is about 2


def test_the_answer_of_lowest_energy_is_the_answer(corpus, monkeypatch):
    run = types.SimpleNamespace(cfg=train.Config(), corpus=corpus)
    truth, asked = {item.statement: item.answer for item in corpus.cloze}, []

    def energy(run, tokenizer, before, values, after):
        """Only the held-out wordings know; the others prefer what stands first."""
        own = truth.get(f"{before}{{a}}{after}")
        asked.append(own)
        return torch.tensor([float(value != own) if own else float(i + 1) for i, value in enumerate(values)])
    monkeypatch.setattr(evaluate, "gap_energy", energy)
    found = facts.ranked(run)
    assert found["energy_TXT_heldout"] == 1.0 and found["energy_TXT"] < 0.3
    assert found["auroc_energy"] == 1.0                     # no statement about an invented subject fits as well
    assert sum(own is not None for own in asked) == 81 + 152 and len(asked) == 81 * 8 + 152 + 107


def test_readouts_of_perfect_thoughts_and_of_relation_means(questions, monkeypatch):
    torch.manual_seed(0)
    concepts = torch.randn(len(questions.answers), 16)
    run = types.SimpleNamespace(cfg=types.SimpleNamespace(memory="thought"), device="cpu")
    monkeypatch.setattr(evaluate, "say", lambda run, thoughts: questions.answers)
    means = questions.rivals.float() @ concepts / questions.rivals.sum(1, keepdim=True)
    for latents, r2, right in (concepts[questions.answer_of], 1.0, 1.0), (means, 0.0, None):
        monkeypatch.setattr(evaluate, "think_all", lambda run, tokens: tjepa.Thought(latents, None, None))
        found = facts.readouts(run, questions, concepts)
        assert found["r2_LAT_heldout"] == pytest.approx(r2, abs=1e-5)
        if right:
            assert found["r1_all_TXT"] == found["em_snapped_LAT_heldout"] == right


# -- the GPT -----------------------------------------------------------------------------------------------------------

def test_a_gpt_that_is_told_answers_and_its_vectors_can_teach(toy):
    folder, cfg = toy
    cfg = dataclasses.replace(cfg, way="gpt", out=str(folder / "GPT_0"), qa_batch_size=12)
    assert facts.measure(cfg)["em_DEC"] == 1.0
    vectors = data.read_vectors(folder / "GPT_0" / "vectors.npz", sorted(colour for _, colour in PAIRS))
    assert vectors.shape == (12, 32) and torch.pdist(vectors).min() > 0
    student = dataclasses.replace(facts.plain(cfg), out=str(folder / "run"), teacher=str(folder / "GPT_0/vectors.npz"))
    train.run(dataclasses.replace(student, phase="pretrain"))
    assert train.run(dataclasses.replace(student, phase="distill"))["r1_DEC"] > 0.8


def test_the_gpt_is_asked_for_the_answer_and_its_end_and_for_nothing_else(toy):
    _, cfg = toy
    corpus = facts.corpus_of(cfg)
    questions = data.Questions(corpus.qa, corpus.tokenizer, cfg.block_size, cfg.answer_size, "cpu")
    heard = []

    class Model(torch.nn.Module):
        cfg = types.SimpleNamespace(**{name: getattr(corpus.tokenizer, name) for name in ("pad", "bos", "eos", "mask")})

        def forward(self, tokens, goal):
            heard.append((tokens, goal))
            return None, torch.zeros(())
    cfg = dataclasses.replace(cfg, question_drop=0.9, qa_batch_size=200)
    facts.answering(types.SimpleNamespace(model=Model(), device="cpu"), questions, cfg)(0.0)
    (tokens, goal), = heard
    answers, mask = {colour for _, colour in PAIRS}, corpus.tokenizer.mask
    for row, wanted in zip(tokens, goal):
        ids = wanted[wanted >= 0].tolist()
        assert corpus.tokenizer.decode(ids[:-1]).strip() in answers and ids[-1] == corpus.tokenizer.eos
        assert not ((row == mask) & ((wanted >= 0).cumsum(0) > 1)).any()        # no answer is hidden from what follows
    assert (tokens[:, 0] == corpus.tokenizer.bos).all() and (tokens == mask).float().mean() > 0.3


def test_bad_flags_of_teachers_are_one_line(tmp_path, capsys):
    for argv, words in ((["--teacher=gpt4"], "one of gpt, letters, random"), (["--out=gpt.txt"], "must end in .npz"),
                        ([f"--run={tmp_path}", f"--out={tmp_path}/v.npz"], "no checkpoint in --run=")):
        with pytest.raises(SystemExit) as error:
            teachers.main(argv)
        assert error.value.code == 2 and words in capsys.readouterr().err


def test_the_command_writes_what_train_reads(toy, capsys):
    folder, cfg = toy
    run = dataclasses.replace(facts.plain(cfg), out=str(folder / "taught"), phase="pretrain", pretrain_steps=2)
    train.run(run)
    train.run(dataclasses.replace(run, phase="distill", distill_steps=2))
    teachers.main([f"--run={folder / 'taught'}", f"--out={folder / 'gpt.npz'}"])
    assert "12 answers, 32 numbers each" in capsys.readouterr().out
    train.run(dataclasses.replace(run, phase="distill", distill_steps=2, teacher=str(folder / "gpt.npz")))
    assert train.load_checkpoint(run.out)["config"]["teacher_width"] == 32
