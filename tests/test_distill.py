"""Large teaches small, and the lab about it: one property a test. The worlds are tiny, as in test_train."""
import csv
import dataclasses

import pytest
import torch

import align
import data
import sample
import train
from labs import distillation as lab
from labs.measures import cka
from tests.toy import FLAGS, write_corpus

SMALL = dict(n_embd=24, pred_embd=16, pretrain_steps=0, distill="align", distill_steps=180, speak_steps=100,
             distill_lr=8e-3, alpha_start=0.0)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A teacher that has been through all three phases, and its student, of the README's three commands: (folder,
    teacher's Config, student's, figures)."""
    folder = tmp_path_factory.mktemp("toy")
    write_corpus(folder)
    large, small = config(folder, "large"), student(folder, "small")
    train.run(large)
    flags = [f"--{name}={value}" for name, value in (FLAGS | SMALL).items() if name not in ("distill", "alpha_start")]
    train.main([*flags, "--phase=pretrain", f"--data={small.data}", f"--out={small.out}"])
    train.main(["--phase=distill", "--distill=align", f"--teacher={small.teacher}", f"--qa={small.qa}",
                f"--out={small.out}"])
    train.main(["--phase=speak", "--alpha_start=0", f"--out={small.out}"])
    rows = train.load_checkpoint(small.out)["rows"]
    return folder, large, small, {name: value for row in rows for name, value in row.items()}


def config(folder, name, **changes):
    return train.Config(**{**FLAGS, "data": str(folder / "text.txt"), "qa": str(folder / "qa.tsv"),
                           "out": str(folder / name), **changes})

def student(folder, name, **changes):
    return config(folder, name, **(SMALL | dict(teacher=f"ckpt:{folder / 'large'}") | changes))

def opened(cfg):
    """Model and checkpoint of a run."""
    saved = train.load_checkpoint(cfg.out)
    tokenizer = data.Tokenizer.from_state(saved["tokenizer"])
    return train.build(train.Config(**saved["config"]), tokenizer, saved["model"]), saved

def asked(cfg):
    """What align works on, untrained: (Run, Questions, Teacher)."""
    corpus = data.load(cfg)
    questions = data.Questions(corpus.qa, corpus.tokenizer, cfg.block_size, cfg.answer_size, "cpu")
    teacher = train.open_teacher(cfg, questions.answers, corpus.tokenizer)
    model = train.build(dataclasses.replace(cfg, teacher_width=teacher.vectors.size(1)), corpus.tokenizer)
    return train.Run(cfg, model, corpus, "cpu", None), questions, teacher


# -- imitation ---------------------------------------------------------------------------------------------------------

def test_a_student_of_another_width_answers_and_is_like_its_teacher(toy):
    """It saw no answer in phase 2; its latents of text are the teacher's, those of an untrained one are not."""
    folder, large, small, figures = toy
    assert figures["r1_DEC"] > 0.8 and figures["em_DEC"] > 0.8 and figures["em_shuffled"] < 0.5
    teacher, _ = opened(large)
    mine, saved = opened(small)
    text = data.load(large).val.rows(range(40))
    with torch.no_grad():
        theirs = teacher.concept(text)
        alike = [cka(model.concept(text), theirs) for model in (mine, train.build(small, data.load(small).tokenizer))]
    assert alike[0] > 0.9 and alike[0] > alike[1] + 0.1
    assert saved["config"]["teacher_width"] == large.n_embd and mine.cfg.n_embd == 24


def test_the_concepts_of_a_student_are_those_that_its_teacher_was_taught(toy):
    """So a chain has one space of thoughts, whatever its members' widths: the student of the student has it too."""
    folder, large, small, _ = toy
    third = student(folder, "third", teacher=f"ckpt:{small.out}", n_embd=8, pred_embd=8, phase="all", distill_steps=3,
                    speak_steps=2, n_head=1)
    train.run(third)
    concepts = [train.load_checkpoint(cfg.out)["concepts"] for cfg in (large, small, third)]
    for other in concepts[1:]:
        torch.testing.assert_close(other, concepts[0], atol=1e-4, rtol=1e-4)


def test_a_teacher_is_not_changed_by_its_student(toy):
    folder, large, small, _ = toy
    run, questions, teacher = asked(student(folder, "never"))
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    table = train.teach(run, questions, teacher.vectors)
    loss_at, _ = teacher.align(run, questions, table)
    optimizer = train.optimizer_for(run, "distill", None)
    start = run.model.target.embed.weight.clone()
    for _ in range(2):
        train.take_step(run, "distill", optimizer, loss_at, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.model.parameters())
    assert not torch.equal(run.model.target.embed.weight, start)        # encode() learns, behind the online encoder
    assert not torch.equal(run.model.target.embed.weight, run.model.encoder.embed.weight)


def test_a_teacher_as_its_own_student_has_nothing_to_learn_of_thoughts(toy):
    """The target of a thought is the teacher's own, in the units of the table: R2 is 1 without a step."""
    folder, large, *_ = toy
    cfg = student(folder, "same", align="thought", n_embd=large.n_embd, pred_embd=large.pred_embd)
    run, questions, teacher = asked(cfg)
    table = train.teach(run, questions, teacher.vectors)
    weights = {**teacher.model.state_dict(), "W.weight": torch.eye(32), "W.bias": torch.zeros(32)}
    run.model.load_state_dict({name: weights[name] for name in run.model.state_dict()})
    run.model.concept_mean.copy_(teacher.vectors.mean(0))
    run.model.concept_std.fill_(1)
    run.model.W.bias.data = -run.model.concept_mean.clone()
    loss, stats = teacher.align(run, questions, table)[0](0.0)
    assert stats["r2"] > 0.999 and loss.item() < 1e-3


@pytest.mark.parametrize("part", align.PARTS)
def test_each_part_alone_is_learned(toy, part):
    folder, *_ = toy
    run, questions, teacher = asked(student(folder, "never", align=part))
    loss_at, _ = teacher.align(run, questions, train.teach(run, questions, teacher.vectors))
    optimizer, losses = train.optimizer_for(run, "distill", None), []
    for _ in range(20):
        torch.manual_seed(0)        # the same batch
        losses.append(train.take_step(run, "distill", optimizer, loss_at, 0.0)[0].item())
    assert losses[-1] < 0.8 * losses[0]


def test_axes_keep_the_shape_of_the_widest_directions():
    """Latents in 3 of 12 dimensions, far from the origin: three axes hold all of them, unstretched, of size 1; and a
    dimension that is a hundred times as large as the others weighs as much as they do."""
    torch.manual_seed(0)
    mix = torch.randn(3, 12)
    latents, real = torch.randn(40, 10, 3) @ mix + 5, torch.rand(40, 10) < 0.8
    mean, turn = align.axes(latents, real, 3, ("tokens",))
    turned = ((latents - mean) @ turn)[real]
    assert turn.shape == (12, 3) and abs(turned.square().mean().item() - 1) < 0.01 and turned.mean(0).abs().max() < 1e-4
    z = latents[real]
    z = (z - z.mean(0)) / z.std(0)
    assert cka(turned, z) > 0.9999
    spread = turned.std(0)
    assert spread[0] >= spread[1] >= spread[2] > 0.01
    units = torch.tensor([100.0] + [1.0] * 11)
    other = align.axes(latents * units, real, 3, ("tokens",))[1]
    torch.testing.assert_close(other * units[:, None], turn, atol=1e-4, rtol=1e-3)
    assert align.axes(latents, real, 20, ("tokens", "pooled"))[1].shape == (12, 12)     # a wider student


# -- another tokenizer -------------------------------------------------------------------------------------------------

def test_another_vocabulary_can_be_taught_by_whole_texts_but_not_by_tokens(toy):
    folder, *_ = toy
    cfg = student(folder, "words", vocab_size=300, align="pooled+thought", answer_size=16, distill_steps=60,
                  speak_steps=1)
    figures = train.run(cfg)
    assert figures["r2"] > 0.4
    with pytest.raises(ValueError, match="--align=tokens.*tokenizer.*--align=pooled"):
        train.run(student(folder, "tokens", vocab_size=300, answer_size=16))


def test_the_teacher_reads_the_same_text_in_its_own_tokens(toy):
    folder, large, *_ = toy
    run, questions, teacher = asked(student(folder, "never", vocab_size=300, align="pooled", answer_size=16))
    rows = run.corpus.train.rows(range(5))
    seen = teacher.read(rows, run.corpus.tokenizer)
    assert seen.shape != rows.shape
    for mine, theirs in zip(rows.tolist(), seen.tolist()):
        assert run.corpus.tokenizer.decode(mine).startswith(teacher.tokenizer.decode(theirs))
    assert teacher.read(rows, teacher.tokenizer) is rows


# -- rounds, resuming --------------------------------------------------------------------------------------------------

def test_a_round_begins_with_a_fresh_optimizer_and_schedule(toy, monkeypatch):
    folder, *_ = toy
    seen, real = [], train.take_step

    def spy(run, phase, optimizer, *rest):
        seen.append((phase, len(optimizer.state), optimizer.param_groups[0]["lr"]))
        return real(run, phase, optimizer, *rest)
    monkeypatch.setattr(train, "take_step", spy)
    train.run(student(folder, "rounds", rounds=2, distill_steps=8, speak_steps=8, warmup=0.0))
    taught, spoken = ([row[1:] for row in seen if row[0] == phase] for phase in ("distill", "speak"))
    assert [state == 0 for state, _ in taught] == [True, False, False, False] * 2
    assert [lr for _, lr in taught[:4]] == [lr for _, lr in taught[4:]] and taught[3][1] < 0.5 * taught[0][1]
    assert [state == 0 for state, _ in spoken] == [True] + [False] * 7      # rounds are phase 2's


@pytest.mark.parametrize("stop_at", (4, 8))
def test_an_aligned_run_resumes_bit_exactly(toy, monkeypatch, stop_at):
    """Also where a round ends."""
    folder, *_ = toy
    changes = dict(rounds=2, distill_steps=16, speak_steps=2)
    train.run(student(folder, f"whole_{stop_at}", **changes))
    save, out = train.save_checkpoint, folder / f"stopped_{stop_at}"

    def save_and_die(where, checkpoint):
        save(where, checkpoint)
        if (checkpoint["phase"], checkpoint["step"]) == ("distill", stop_at):
            raise RuntimeError("pulled the plug")
    monkeypatch.setattr(train, "save_checkpoint", save_and_die)
    with pytest.raises(RuntimeError, match="plug"):
        train.run(student(folder, out.name, eval_every=stop_at, **changes))
    monkeypatch.setattr(train, "save_checkpoint", save)
    train.main(["--resume", f"--out={out}", "--eval_every=50"])
    resumed, whole = (train.load_checkpoint(folder / name)["model"] for name in (out.name, f"whole_{stop_at}"))
    assert not [name for name in whole if not torch.equal(resumed[name], whole[name])]


def test_a_student_can_be_asked(toy, capsys):
    """sample.py knows the student's concepts, which are its teacher's, and the threshold for not knowing."""
    folder, large, small, _ = toy
    sample.main([f"--out={small.out}", "--prompt=What is the colour of the moss?", "--always_answer"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("green")
    sample.main([f"--out={small.out}", "--inspect=What is the colour of the moss?"])
    assert capsys.readouterr().out.splitlines()[2].endswith("green")


# -- bad input ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, error", [
    (dict(teacher="self"), "--distill=align imitates a run.*--teacher=ckpt:DIR"),
    (dict(teacher="ckpt:nowhere"), "no checkpoint in --teacher=ckpt:nowhere"),
    (dict(teacher="ckpt:{}/read"), "was not taught.*--phase=distill"),
    (dict(block_size=40), "--block_size=40.*another --out, with --block_size=32")])
def test_who_cannot_teach_is_refused_in_one_line(toy, changes, error):
    folder, *_ = toy
    train.run(config(folder, "read", phase="pretrain", pretrain_steps=0))
    changes = {name: value.format(folder) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=error) as stop:
        train.run(student(folder, "refused", **changes))
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("changes, error", [(dict(align="words"), "--align=words must be some of tokens"),
                                            (dict(align=""), "--align="), (dict(distill="x"), "--distill=x"),
                                            (dict(rounds=0), "--rounds=0")])
def test_a_bad_flag_names_itself(changes, error):
    with pytest.raises(ValueError, match=error):
        train.Config(**changes)


# -- the lab -----------------------------------------------------------------------------------------------------------

def test_the_students_encoders_have_a_quarter_and_a_sixteenth_of_the_parameters():
    """Embedding and blocks, without EMA copy, predictor and decoder."""
    counts = {}
    for size, shape in lab.SIZES.items():
        cfg = train.Config(**shape)
        counts[size] = sum(p.numel() for p in train.tjepa.Encoder(cfg).parameters())
    assert 3.6 < counts["large"] / counts["medium"] < 4.4 and 14.4 < counts["large"] / counts["small"] < 17.6


def test_arms_read_as_many_texts_and_questions_unless_their_name_says_otherwise():
    for name, cfg in lab.students(False).items():
        route, imitates = cfg.route.split(), cfg.align_steps
        texts = sum(dict(read=cfg.pretrain_steps, text=imitates, both=imitates).get(part, 0) for part in route)
        asks = sum(dict(answers=cfg.distill_steps, thoughts=imitates, both=imitates).get(part, 0) for part in route)
        if not any(word in name for word in ("twice", "phase 1 first", "untrained", "thoughts only")):
            assert (texts, asks) == (lab.STEPS, lab.STEPS), name
        assert (cfg.batch_size, cfg.qa_batch_size, cfg.speak_steps, cfg.alpha_start) == (48, 128, 500, 0.0)
        assert cfg.versus in lab.teachers(False)
    assert {arm for question in lab.QUESTIONS for arm in question[1:]} <= {
        *lab.teachers(False), *lab.students(False), *lab.LATER}


def test_equal_compute_buys_the_students_flops_and_its_teachers():
    rows = [dict(arm="medium distilled", seed=0, pflop=7.0), dict(arm="medium from scratch", seed=0, pflop=1.0)]
    cfg, = lab.later(False, rows, ["medium from scratch equal compute"]).values()
    assert cfg.pretrain_steps * cfg.batch_size == 7 * lab.STEPS * 48
    assert cfg.distill_steps * cfg.qa_batch_size == 7 * lab.STEPS * 128
    with pytest.raises(ValueError, match="small distilled"):
        lab.later(False, rows, ["small from scratch equal compute"])


def test_a_difference_within_the_spreads_is_a_tie():
    assert lab.verdict([0.5, 0.6, 0.7], [0.4, 0.5, 0.6]).startswith("tie")
    assert lab.verdict([0.9, 0.91, 0.92], [0.4, 0.5, 0.6]).startswith("above (+0.41")
    assert lab.verdict([0.1, 0.11, 0.12], [0.4, 0.5, 0.6]).startswith("below")
    assert lab.verdict([0.5], [0.4, 0.5]) == "not measured"


def test_what_is_kept_is_counted_from_an_untrained_one_and_from_the_same_seed():
    def rows(*untrained):
        """Of a large one, untrained ones and distilled ones."""
        return [dict(arm=arm, seed=seed, probe=probe, em_DEC_heldout=match) for arm, seed, probe, match in (
            ("large T-JEPA", 0, 0.8, 0.8), ("large T-JEPA", 1, 0.81, 0.9),
            *(("medium untrained", seed, probe, 0.0) for seed, probe in enumerate(untrained)),
            ("medium distilled", 0, 0.7, 0.72), ("medium distilled", 1, 0.7, 0.72))]
    first, second = lab.retained(rows(0.4, 0.41))[-2:]
    assert first["kept_probe"] == pytest.approx(0.75) and second["kept_probe"] == pytest.approx(0.725)
    assert first["kept_DEC"] == pytest.approx(0.9) and second["kept_DEC"] == pytest.approx(0.8)
    assert "kept_probe" not in lab.retained(rows(0.4, 0.9))[-1]          # the teacher is no better: a share of nothing


def test_likeness_knows_itself_and_a_stranger(toy):
    folder, large, small, _ = toy
    runs = [train.Run(cfg, opened(cfg)[0], data.load(large), "cpu", None) for cfg in (large, small)]
    runs.append(runs[0]._replace(model=train.build(dataclasses.replace(large, seed=1), runs[0].corpus.tokenizer)))
    itself, like, stranger = (lab.likeness(run, runs[0]) for run in runs)
    assert itself["cka"] > 0.999 and itself["knn"] > 0.999 and itself["linear"] > 0.99
    assert itself["cka"] > like["cka"] > stranger["cka"]


def test_every_arm_of_the_lab_can_be_tried_in_a_few_steps():
    for name, cfg in (lab.teachers(True) | lab.students(True)).items():
        assert max(cfg.pretrain_steps, cfg.distill_steps, cfg.align_steps, cfg.speak_steps) <= 4, name
