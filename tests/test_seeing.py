"""Scenes hold out what they say, eyes read what they should, and selective decoding obeys."""
import dataclasses
import random

import numpy as np
import pytest
import torch

from data.scenes import prepare as world
from labs import seeing, streams
from labs import seeing_model as eyes
from tests import toy

SCENE = (world.Thing("large", "red", "circle", 0), world.Thing("small", "blue", "square", 4))


# -- scenes ----------------------------------------------------------------------------------------
def test_pictures_of_training_hold_nothing_that_is_held_out():
    """Neither pairs nor combinations; a scene that is asked for has exactly one of them."""
    random_ = random.Random(0)
    for _ in range(200):
        assert {world.kind_of(thing) for thing in world.draw_scene(random_)} == {"seen"}
        scene = world.draw_scene(random_, "pair")
        assert sum(world.kind_of(thing) == "pair" for thing in scene) == 1
    for scene in world.stream(random_, 200, 0.5):
        assert {world.kind_of(thing) for thing in scene} == {"seen"}


def test_text_names_no_unheard_combination_no_held_out_wording_and_no_flag():
    """What only pictures can teach is not in the text."""
    text = " ".join(world.documents(400))
    unheard = world.BY_KIND["unheard"]
    for wording in range(world.N_WORDINGS):
        assert not any(world.say(thing, wording) in text for thing in unheard)
    assert not any(world.say(thing, world.HELD_OUT) in text for thing in world.EVERY)
    assert "flag" not in text and "France" in text and "Paris" in text


def test_a_question_has_one_answer():
    """Not of two objects on one side, and not of a colour that two objects share."""
    asked = {(kind, *some.values()): answer for kind, some, answer in world.questions(SCENE)}
    assert asked["relation", "red", "circle", "right of"] == "a blue square"
    assert asked["relation", "blue", "square", "above"] == "a red circle"
    assert asked["count",] == "two" and asked["place", "blue", "square"] == "in the middle"
    three = (*SCENE, world.Thing("small", "blue", "cross", 8))
    asked = {(kind, *some.values()) for kind, some, _ in world.questions(three)}
    assert ("relation", "red", "circle", "right of") not in asked
    assert ("shape", "blue") not in asked and ("shape", "red") in asked


def test_a_caption_says_of_each_place_what_is_there():
    said = world.caption(SCENE)
    assert said[0] == "A large red circle at the top left."
    assert said[4] == "A small blue square in the middle."
    assert len(said) == 9 and said.count(world.EMPTY) == 7


def test_a_picture_has_its_colours_where_the_scene_says():
    """The middle pixel of a cell; a large shape covers more than a small one."""
    rng = np.random.default_rng(0)
    large, small = (world.render([(world.Thing(size, "red", "square", 8),)], rng)[0]
                    for size in ("large", "small"))
    assert large[40, 40, 0] > 0.5 and large[40, 40, 2] < 0.3 and abs(large[5, 5]).max() < 0.5
    red = [(one[..., 0] - one[..., 2] > 0.3).sum() for one in (large, small)]
    assert red[0] > 1.9 * red[1] > 0


def test_every_flag_differs_from_every_other():
    """Two countries with one flag could not be told apart."""
    y, x = np.mgrid[0:1:16j, 0:1:16j] * 0.999
    drawn = {world.plain_flag(country)(x, y).tobytes() for country in world.COUNTRIES}
    assert len(drawn) == len(world.COUNTRIES) == len({a for a, b, _ in world.facts()})


def test_the_light_of_a_stream_changes_and_its_scene_does_not():
    """So pixels may change where no caption does."""
    look = world.steady_look(64, np.random.default_rng(0))
    assert 1 < len(set(look.light)) < 30
    assert abs(look.shift - look.shift[:1]).max() < 0.5


# -- eyes ------------------------------------------------------------------------------------------
CFG = dataclasses.replace(seeing.BASE, n_embd=32, pred_embd=16, n_layer=1, top_k=1, n_head=2,
                          dec_layer=1, documents=80, eye_layer=1)


@pytest.fixture(scope="module")
def side():
    """(model, words) of a random text side."""
    corpus = eyes.corpus_of(CFG.block_size, CFG.vocab_size, CFG.documents)
    tokenizer = corpus.tokenizer
    fields = {name: getattr(CFG, name) for name in toy.SMALL}
    model = toy.tjepa.TJEPA(toy.tjepa.Config(**fields | dict(vocab_size=tokenizer.vocab_size)),
                            tokenizer.word_start)
    return model, eyes.words_of(model, tokenizer, CFG)


def seer_of(side, **changes):
    """A random seer, always the same."""
    torch.manual_seed(0)
    return eyes.Seer(dataclasses.replace(CFG, **changes), *side)


def lesson(words):
    """Eight pictures: four captions, three questions, a flag; always the same."""
    torch.manual_seed(3)
    return eyes.lesson(words, 8)


def test_words_are_those_that_the_scenes_need(side):
    """Latents are finite and standardised; the unheard are marked."""
    words = side[1]
    assert len(words.texts) == len(set(words.texts)) == len(words.latents)
    assert words.latents[words.named].mean(0).abs().max() < 1e-4
    assert (~words.named).sum() == len(world.BY_KIND["unheard"])
    assert words.texts[lesson(words).answer[-1, 0]] in world.COUNTRIES


def test_a_patch_is_a_square_of_the_picture():
    """A pixel changes the input of one patch: with no block, one latent."""
    torch.manual_seed(0)
    eye = eyes.PatchEncoder(dataclasses.replace(CFG, eye_layer=1))
    eye.blocks = torch.nn.ModuleList()
    picture = torch.rand(1, world.SIZE, world.SIZE, 3)
    before = eye(picture)
    picture[0, 17, 33] += 1                             # second row of patches, third column
    assert (eye(picture) != before).any(-1).nonzero().tolist() == [[0, 1 * 3 + 2]]


def test_a_blind_arm_sees_nothing_and_padding_asks_nothing(side):
    """Other pictures, other padding: the same thoughts."""
    words, batch = side[1], lesson(side[1])
    blind = seer_of(side, eye="blind")
    dark = batch._replace(pictures=torch.zeros_like(batch.pictures))
    assert torch.equal(blind.think(words, batch), blind.think(words, dark))
    seer = seer_of(side)
    assert not torch.allclose(seer.think(words, batch), seer.think(words, dark))
    noisy = torch.where(words.asked[..., None], words.questions, torch.tensor(7.0))
    assert torch.allclose(seer.think(words._replace(questions=noisy), batch),
                          seer.think(words, batch), atol=1e-5)


@pytest.mark.parametrize("change, trained", [
    ({}, {"eye", "predictor"}), (dict(eye="random"), {"predictor"}),
    (dict(eye="shuffled"), {"eye", "predictor"}), (dict(eye="blind"), {"predictor"}),
    (dict(decoder="tuned"), {"eye", "predictor", "decoder"})])
def test_only_what_an_arm_trains_changes(side, tmp_path, change, trained):
    """The text side stays as it is, bit by bit, unless the decoder is tuned."""
    model, words = side
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    cfg = dataclasses.replace(CFG, picture_steps=2, qa_batch_size=8, out=str(tmp_path), **change)
    corpus = eyes.corpus_of(CFG.block_size, CFG.vocab_size, CFG.documents)
    run = eyes.train.Run(eyes.plain(cfg), model, corpus, "cpu", None)
    before = {name: value.clone() for name, value in seer_of(side, **change).state_dict().items()}
    seer, _ = eyes.train_seer(run, words, cfg)
    moved = {name.split(".")[0] for name, value in seer.state_dict().items()
             if not torch.equal(value, before[name])}
    assert moved == trained
    stays = {name for name, value in model.state_dict().items() if torch.equal(value, kept[name])}
    assert {name for name in kept if not name.startswith("decoder")} <= stays
    model.load_state_dict(kept)


def test_infonce_has_no_rival_that_is_the_answer_itself():
    """An answer that a batch has twice is one candidate: right predictions lose almost nothing."""
    latents = torch.eye(6) * 3
    number = torch.tensor([1, 1, 1, 4])
    assert eyes.infonce(latents[number], number, latents) < 1e-3
    assert eyes.infonce(latents[number.flip(0)], number, latents) > 1


def test_an_arm_runs_to_its_figures(tmp_path):
    """All phases, eyes and streams: each figure but the costs is a share or a ratio."""
    cfg = dataclasses.replace(
        CFG, pretrain_steps=2, distill_steps=2, speak_steps=2, picture_steps=2, batch_size=4,
        qa_batch_size=8, asked=6, streams=1, out=str(tmp_path / "lab" / "arm_0"))
    found = seeing.measure(cfg)
    assert {"caption", "caption_new", "flag_shuffled", "hop", "retrieval"} <= set(found)
    assert found["text_lost"] == 0
    shares = [value for name, value in found.items()
              if name.startswith(("caption", "question", "flag", "probe", "stream"))]
    assert all(0 <= value <= 1 for value in shares)


# -- streams ---------------------------------------------------------------------------------------
def steps_of(*lengths):
    """Latents (T, 2) that stay for some frames and then jump; a little noise."""
    torch.manual_seed(0)
    levels = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).float()
    return levels[:, None] * 5 + 0.01 * torch.randn(len(levels), 2)


def test_each_jump_is_decoded_once():
    """By both ways, whatever lies between; a high threshold leaves one decode."""
    frames = steps_of(10, 1, 20, 33)
    assert streams.by_variance(frames, 1.0) == [0, 10, 11, 31]
    assert streams.by_clustering(frames, 1.0) == [0, 10, 11, 31]
    assert streams.by_variance(frames, 1e4) == streams.by_clustering(frames, 1e6) == [0]


def test_the_oracle_decodes_changes_and_uniform_decoding_is_uniform():
    """At equal numbers; without enough changes the oracle needs fewer."""
    truth = ["a"] * 20 + ["b"] * 30 + ["c"] * 14
    assert streams.oracle(random.Random(0), truth, 9) == [0, 20, 50]
    assert len(streams.oracle(random.Random(0), truth, 2)) == 2
    assert streams.uniform(4) == [0, 16, 32, 48]
    assert len(set(streams.at_random(random.Random(0), 8))) == 8


def test_the_last_caption_stays_until_the_next_decode():
    truth = ["a"] * 20 + ["b"] * 44
    assert streams.held([0, 32], truth) == ["a"] * 32 + ["b"] * 32
    watched = streams.Watched(None, None, [truth], [truth])
    assert streams.quality(watched, [[0, 32]]) == (2, 52 / 64)
    assert streams.quality(watched, [[0, 20]]) == (2, 1)
