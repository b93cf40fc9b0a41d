"""Large teaches small, and the lab about it: one property a test, on the toy world."""
import dataclasses

import pytest
import torch

import align
import data
import report
import sample
import train
from labs import distillation as lab
from labs.measures import cka
from tests.toy import FLAGS, as_argv, config, weights, write_corpus

SMALL = dict(n_embd=24, pred_embd=16, pretrain_steps=0, distill="align", distill_steps=180,
             speak_steps=100, distill_lr=8e-3, alpha_start=0.0)


def student(folder, name, **changes):
    """The Config of a student in a folder, of the teacher "large"."""
    changes = SMALL | dict(teacher=f"ckpt:{folder / 'large'}") | changes
    return config(folder, folder / name, **changes)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A teacher after all three phases, and its student, by the three commands of the README.

    (folder, the teacher's Config, the student's Config, the student's figures)
    """
    folder = tmp_path_factory.mktemp("toy")
    write_corpus(folder)
    large, small = config(folder, folder / "large"), student(folder, "small")
    train.run(large)
    flags = FLAGS | SMALL
    del flags["distill"], flags["alpha_start"]
    train.main([*as_argv(flags), "--phase=pretrain", f"--data={small.data}", f"--out={small.out}"])
    train.main(["--phase=distill", "--distill=align", f"--teacher={small.teacher}",
                f"--qa={small.qa}", f"--out={small.out}"])
    train.main(["--phase=speak", "--alpha_start=0", f"--out={small.out}"])
    return folder, large, small, report.newest(train.load_checkpoint(small.out)["rows"])


def opened(cfg):
    """The model of a finished run."""
    saved = train.load_checkpoint(cfg.out)
    tokenizer = data.Tokenizer.from_state(saved["tokenizer"])
    return train.build(train.Config(**saved["config"]), tokenizer, saved["model"])


def begin(cfg):
    """A run of phase 2 that is about to imitate its teacher: `train.Run`."""
    corpus = data.load(cfg)
    questions = data.Questions(
        corpus.qa, corpus.tokenizer, cfg.block_size, cfg.answer_size, "cpu")
    teacher = train.open_teacher(cfg, questions.answers)
    shape = dataclasses.replace(cfg, teacher_width=teacher.vectors.size(1))
    model = train.build(shape, corpus.tokenizer)
    run = train.Run(cfg, model, corpus, "cpu", None, questions, teacher=teacher)
    return run._replace(concepts=train.set_answers(run, teacher.vectors))


def steps(run, loss_at, n):
    """Losses of n steps of phase 2, always on the same batch."""
    optimizer = train.make_optimizer(run, "distill")
    losses = []
    for _ in range(n):
        torch.manual_seed(0)
        loss, _ = loss_at(0.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if train.target_moves(run.cfg, "distill"):
            run.model.ema_update()
        losses.append(loss.item())
    return losses


# -- imitation -------------------------------------------------------------------------------------

def test_a_student_of_another_width_answers_and_is_like_its_teacher(toy):
    """It saw no answer in phase 2. Its latents of text are the teacher's; a stranger's are not."""
    folder, large, small, figures = toy
    assert figures["r1_DEC"] > 0.8
    assert figures["em_DEC"] > 0.8
    assert figures["em_shuffled"] < 0.5
    corpus = data.load(large)
    text = corpus.val.rows(range(40))
    with torch.no_grad():
        theirs = opened(large).concept(text)
        mine = cka(opened(small).concept(text), theirs)
        stranger = cka(train.build(small, corpus.tokenizer).concept(text), theirs)
    assert mine > 0.9
    assert mine > stranger + 0.1


def test_a_chain_has_one_space_of_thoughts_whatever_the_widths(toy):
    """The concepts of a student, and of its student, are those that the teacher was taught."""
    folder, large, small, _ = toy
    third = student(folder, "third", teacher=f"ckpt:{small.out}", n_embd=8, pred_embd=8, n_head=1,
                    distill_steps=3, speak_steps=2)
    train.run(third)
    first, *others = (train.load_checkpoint(cfg.out)["concepts"] for cfg in (large, small, third))
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-4, rtol=1e-4)


def test_a_teacher_is_not_changed_by_its_student(toy):
    folder, *_ = toy
    run = begin(student(folder, "never"))
    teacher = run.teacher.model
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    loss_at, _ = align.align(run)
    start = run.model.target_encoder.embed.weight.clone()
    steps(run, loss_at, 2)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    # the student's target encoder follows its context encoder
    target = run.model.target_encoder.embed.weight
    assert not torch.equal(target, start)
    assert not torch.equal(target, run.model.context_encoder.embed.weight)


def test_a_teacher_as_its_own_student_has_nothing_to_learn_of_thoughts(toy):
    """The target of a thought is the teacher's own, on the scale of L_a: R2 is 1 at once."""
    folder, large, *_ = toy
    run = begin(student(folder, "same", align="thought", n_embd=large.n_embd,
                        pred_embd=large.pred_embd))
    vectors, model = run.teacher.vectors, run.model
    # W standardises: then the student's thoughts are its teacher's, on that scale
    mean, scale = model.answer_mean.clone(), model.answer_scale.clone()
    taught = run.teacher.model.state_dict()
    new = {"W.weight": scale.T, "W.bias": -mean @ scale, "answer_mean": mean,
           "answer_scale": scale}
    model.load_state_dict({name: (taught | new)[name] for name in model.state_dict()})
    assert vectors.size(1) == large.n_embd
    loss, stats = align.align(run)[0](0.0)
    assert stats["latent"] < 0.001
    assert loss.item() < 1e-3


@pytest.mark.parametrize("part", align.PARTS)
def test_each_part_alone_is_learned(toy, part):
    folder, *_ = toy
    run = begin(student(folder, "never", align=part))
    loss_at, _ = align.align(run)
    losses = steps(run, loss_at, 20)
    assert losses[-1] < 0.8 * losses[0]


def test_axes_keep_the_shape_of_the_widest_directions():
    """Latents in 3 of 12 dimensions, far from the origin: three axes hold all of them."""
    torch.manual_seed(0)
    latents = torch.randn(40, 10, 3) @ torch.randn(3, 12) + 5
    real = torch.rand(40, 10) < 0.8
    mean, axes = align.fit_axes(latents, real, 3, ("tokens",))
    turned = ((latents - mean) @ axes)[real]
    assert axes.shape == (12, 3)
    # of size 1, centred, and not stretched
    assert abs(turned.square().mean().item() - 1) < 0.01
    assert turned.mean(0).abs().max() < 1e-4
    z = latents[real]
    assert cka(turned, (z - z.mean(0)) / z.std(0)) > 0.9999
    spread = turned.std(0)
    assert spread[0] >= spread[1] >= spread[2] > 0.01


def test_axes_weigh_every_dimension_alike_whatever_its_unit():
    torch.manual_seed(0)
    latents, real = torch.randn(40, 10, 12), torch.ones(40, 10, dtype=torch.bool)
    units = torch.tensor([100.0] + [1.0] * 11)
    _, axes = align.fit_axes(latents, real, 3, ("tokens",))
    _, other = align.fit_axes(latents * units, real, 3, ("tokens",))
    torch.testing.assert_close(other * units[:, None], axes, atol=1e-4, rtol=1e-3)
    # a wider student gets as many axes as there are
    assert align.fit_axes(latents, real, 20, ("tokens", "pooled"))[1].shape == (12, 12)


# -- another tokenizer -----------------------------------------------------------------------------

def test_another_vocabulary_can_be_taught_by_whole_texts_but_not_by_tokens(toy):
    folder, *_ = toy
    train.run(student(folder, "words", vocab_size=300, align="pooled+thought", answer_size=16,
                      distill_steps=60, speak_steps=1))
    rows = train.load_checkpoint(folder / "words")["rows"]
    errors = [row["latent"] for row in rows if row["phase"] == "distill" and "latent" in row]
    assert errors[-1] < 0.6
    with pytest.raises(ValueError, match="--align=tokens.*tokenizer.*--align=pooled"):
        train.run(student(folder, "tokens", vocab_size=300, answer_size=16))


def test_the_teacher_reads_the_same_text_in_its_own_tokens(toy):
    folder, *_ = toy
    run = begin(student(folder, "never", vocab_size=300, align="pooled", answer_size=16))
    tokenizer, teacher = run.corpus.tokenizer, run.teacher
    rows = run.corpus.train.rows(range(5))
    seen = teacher.read(rows, tokenizer)
    assert seen.shape != rows.shape
    for mine, theirs in zip(rows.tolist(), seen.tolist()):
        assert tokenizer.decode(mine).startswith(teacher.tokenizer.decode(theirs))
    assert teacher.read(rows, teacher.tokenizer) is rows


# -- rounds, resuming, asking ----------------------------------------------------------------------

def test_a_round_begins_with_a_fresh_optimizer_and_schedule(toy, monkeypatch):
    folder, *_ = toy
    seen = []
    adamw = torch.optim.AdamW

    class Spy(adamw):
        """AdamW that remembers how it finds itself before each step."""

        def step(self, closure=None):
            seen.append((len(self.state), self.param_groups[0]["lr"]))
            return super().step(closure)
    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    train.run(student(folder, "rounds", rounds=2, distill_steps=8, speak_steps=8, warmup=0.0))
    taught, spoken = seen[:8], seen[8:]
    assert [state == 0 for state, _ in taught] == [True, False, False, False] * 2
    assert [lr for _, lr in taught[:4]] == [lr for _, lr in taught[4:]]
    assert taught[3][1] < 0.5 * taught[0][1]
    # rounds are phase 2's
    assert [state == 0 for state, _ in spoken] == [True] + [False] * 7


@pytest.mark.parametrize("stop_at", (4, 8))         # within a round, and where one ends
def test_an_aligned_run_resumes_bit_exactly(toy, monkeypatch, stop_at):
    folder, *_ = toy
    changes = dict(rounds=2, distill_steps=16, speak_steps=2)
    whole, stopped = folder / f"whole_{stop_at}", folder / f"stopped_{stop_at}"
    train.run(student(folder, whole.name, **changes))
    save = train.save_checkpoint

    def save_and_die(out, checkpoint, *rest):
        save(out, checkpoint, *rest)
        if (checkpoint["phase"], checkpoint["step"]) == ("distill", stop_at):
            raise RuntimeError("pulled the plug")
    monkeypatch.setattr(train, "save_checkpoint", save_and_die)
    with pytest.raises(RuntimeError, match="plug"):
        train.run(student(folder, stopped.name, eval_every=stop_at, **changes))
    monkeypatch.setattr(train, "save_checkpoint", save)
    train.main(["--resume", f"--out={stopped}", "--eval_every=50"])
    resumed = weights(stopped)
    assert all(torch.equal(resumed[name], value) for name, value in weights(whole).items())


def test_a_student_can_be_asked(toy, capsys):
    """sample.py knows the student's concepts, which are its teacher's, and its threshold."""
    folder, large, small, _ = toy
    question = "What is the colour of the coal?"
    sample.main([f"--out={small.out}", f"--prompt={question}", "--always_answer"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("black")
    sample.main([f"--out={small.out}", f"--inspect={question}"])
    assert capsys.readouterr().out.splitlines()[2].endswith("black")


# -- bad input -------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, error", [
    (dict(teacher="self"), "--distill=align imitates a run.*--teacher=ckpt:DIR"),
    (dict(teacher="ckpt:nowhere"), "no checkpoint in --teacher=ckpt:nowhere"),
    (dict(teacher="ckpt:{}/read"), "was not taught.*--phase=distill"),
    (dict(block_size=40), "--block_size=40.*another --out, with --block_size=32")])
def test_who_cannot_teach_is_refused_in_one_line(toy, changes, error):
    folder, *_ = toy
    train.run(config(folder, folder / "read", phase="pretrain", pretrain_steps=0))
    if "teacher" in changes:
        changes = dict(teacher=changes["teacher"].format(folder))
    with pytest.raises(ValueError, match=error) as stop:
        train.run(student(folder, "refused", **changes))
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("changes, error", [
    (dict(align="words"), "--align=words must be some of tokens"),
    (dict(align=""), "--align="),
    (dict(distill="x"), "--distill=x"),
    (dict(rounds=0), "--rounds=0")])
def test_a_bad_flag_names_itself(changes, error):
    with pytest.raises(ValueError, match=error):
        train.Config(**changes)


# -- the arms of the lab ---------------------------------------------------------------------------

def test_the_students_encoders_have_a_quarter_and_a_sixteenth_of_the_parameters():
    counts = {}
    for size, shape in lab.SIZES.items():
        encoder = train.tjepa.Encoder(train.Config(**shape))
        counts[size] = sum(p.numel() for p in encoder.parameters())
    assert 3.6 < counts["large"] / counts["medium"] < 4.4
    assert 14.4 < counts["large"] / counts["small"] < 17.6


def steps_of(cfg):
    """Steps that an arm takes on text, and on questions."""
    route = cfg.route.split()
    on_text = dict(read=cfg.pretrain_steps, text=cfg.align_steps)
    on_questions = dict(answers=cfg.distill_steps, thoughts=cfg.align_steps)
    return (sum(on_text.get(part, 0) for part in route),
            sum(on_questions.get(part, 0) for part in route))


def test_students_read_as_many_texts_and_questions_unless_their_name_says_otherwise():
    for name, cfg in (lab.STUDENTS | lab.LATER).items():
        assert (cfg.speak_steps, cfg.alpha_start) == (lab.Arm.speak_steps, 0.0), name
        assert cfg.versus in lab.TEACHERS | lab.STUDENTS
        if "untrained" not in name.split()[1] and "equal" not in name:
            assert steps_of(cfg) == (lab.STEPS, lab.STEPS), name
            assert (cfg.batch_size, cfg.qa_batch_size) == (48, lab.Arm.qa_batch_size), name


def test_equal_compute_takes_the_same_share_more_of_text_and_of_questions():
    for size, wider in ("medium", 2), ("small", 8):
        plain = lab.ARMS[f"{size} from scratch"]
        more = lab.ARMS[f"{size} from scratch equal compute"]
        assert more.batch_size == wider * plain.batch_size
        assert more.qa_batch_size == wider * plain.qa_batch_size
        assert more.pretrain_steps == more.distill_steps > plain.pretrain_steps


# -- one arm of the lab, on the toy world ----------------------------------------------------------

def arm(folder, name, seed=0, **changes):
    """An arm in the place where the lab would put it, with the shape of the toy world."""
    paths = dict(data=str(folder / "text.txt"), qa=str(folder / "qa.tsv"),
                 out=str(folder / f"{name}_{seed}"))
    short = FLAGS | dict(pretrain_steps=2, distill_steps=2, speak_steps=2, align_steps=2)
    return lab.Config(**short | paths | changes, seed=seed)


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A folder with a trained large T-JEPA and a large GPT, and the arms that belong to it."""
    write_corpus(tmp_path)
    arms = {"large T-JEPA": arm(tmp_path, "large T-JEPA"),
            "large GPT": arm(tmp_path, "large GPT", route="lm")}
    monkeypatch.setattr(lab, "ARMS", arms)
    # there are too few facts for the probes, and no other phrasings
    monkeypatch.setattr(lab, "probes", lambda run: dict(probe=0.5))
    costs = {name: lab.measure(cfg)["pflop"] for name, cfg in arms.items()}
    return tmp_path, costs


def test_a_student_imitates_and_speaks_and_pays_for_its_teacher(stage):
    folder, costs = stage
    cfg = arm(folder, "medium distilled", size="medium", route="text thoughts speak", n_embd=16,
              pred_embd=16)
    found = lab.measure(cfg)
    assert {"cka", "knn", "linear", "em_DEC", "r1_DEC", "threshold"} <= set(found)
    assert found["pflop"] > costs["large T-JEPA"] > 0
    saved = train.load_checkpoint(cfg.out)
    assert saved["phase"] == "speak"
    # the student has its teacher's concepts, and so its width of thoughts
    taught = train.load_checkpoint(lab.folder_of(cfg, "large T-JEPA"))
    torch.testing.assert_close(saved["concepts"], taught["concepts"], atol=1e-4, rtol=1e-4)
    assert saved["config"]["teacher_width"] == FLAGS["n_embd"]


def test_a_gpt_teaches_text_and_its_student_teaches_itself(stage):
    folder, costs = stage
    cfg = arm(folder, "medium text of GPT", size="medium", route="text answers speak",
              text="tokens+pooled", versus="large GPT", n_embd=16, pred_embd=16)
    found = lab.measure(cfg)
    assert found["pflop"] > costs["large GPT"] > 0
    assert train.load_checkpoint(cfg.out)["config"]["teacher_width"] == 0


def test_likeness_knows_itself_and_a_stranger(toy):
    folder, large, small, _ = toy
    corpus = data.load(large)
    itself = train.Run(large, opened(large), corpus, "cpu", None)
    like = itself._replace(model=opened(small))
    other = dataclasses.replace(large, seed=1)
    stranger = itself._replace(model=train.build(other, corpus.tokenizer))
    same, alike, strange = (lab.likeness(run, itself) for run in (itself, like, stranger))
    assert same["cka"] > 0.999
    assert same["knn"] > 0.999
    assert same["linear"] > 0.99
    assert same["cka"] > alike["cka"] > strange["cka"]


def test_every_arm_of_the_lab_can_be_tried_in_a_few_steps():
    for name, cfg in lab.ARMS.items():
        short = lab.shrunk(cfg)
        steps = (short.pretrain_steps, short.distill_steps, short.align_steps, short.speak_steps)
        assert max(steps) <= 2, name
