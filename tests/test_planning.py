"""The house obeys its rules, what is held out is not in its text, and the search finds plans."""
import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch

import train
from data.house import prepare as world
from labs import house, house_model, planning
from labs.house_gpt import GPTWorld

N = 60                      # trajectories of a small text
START = world.State("hall", (("ball", "kitchen"), ("key", "garden")))


# -- the house -------------------------------------------------------------------------------------
def after(state, *actions):
    """The state after some actions."""
    for action in actions:
        state = world.step(state, action)
    return state


def test_an_action_that_is_not_possible_changes_nothing():
    """No door, an object elsewhere, an empty hand, a full hand."""
    for action in (("go", "garden"), ("take", "ball"), ("put", "")):
        assert world.step(START, action) == START
    holds = after(START, ("go", "kitchen"), ("take", "ball"), ("go", "garden"))
    assert world.step(holds, ("take", "key")) == holds


def test_what_is_carried_moves_with_the_robot():
    """And stays where it is put down."""
    put = after(START, ("go", "kitchen"), ("take", "ball"), ("go", "garden"), ("put", ""))
    assert dict(put.facts())["ball"] == "garden"


def test_the_cellar_opens_for_the_key_alone():
    """It is entered only by a robot that carries the key."""
    kitchen = START.moved("robot", "kitchen")
    assert world.step(kitchen, ("go", "cellar")) == kitchen
    with_ball = world.step(kitchen, ("take", "ball"))
    assert world.step(with_ball, ("go", "cellar")) == with_ball
    with_key = kitchen.moved("key", world.HAND)
    assert world.step(with_key, ("go", "cellar")).robot == "cellar"


def test_a_shortest_plan_reaches_its_goal_and_no_shorter_one_does():
    """All action sequences that are shorter are tried."""
    goal = ("ball", "garden")
    plan = world.shortest_plan(START, goal)
    assert goal in after(START, *plan).facts()
    reached = {START}
    for _ in range(len(plan) - 1):
        reached |= {world.step(state, action) for state in reached for action in world.ACTIONS}
    assert not any(goal in state.facts() for state in reached)


def test_nothing_that_is_held_out_is_in_the_text():
    """Neither combinations nor moves nor wordings."""
    for states, actions in world.trajectories(N):
        source = {}
        for before, action, state in zip(states, actions, states[1:]):
            assert not house.holds_unseen(state)
            if action[0] == "take":
                source[action[1]] = before.robot
            name = before.carried()
            if name and state.carried() is None:
                assert not world.held_out_move(name, source[name], state.robot)
    text = " ".join(world.documents(N))
    for fact in world.FACTS:
        assert world.say_fact(fact, world.HELD_OUT) not in text
    for action in world.ACTIONS:
        assert world.say_action(action, world.HELD_OUT) not in text


def test_a_document_is_a_state_an_action_and_its_outcome():
    """Each fact is said once before and once after the action."""
    fact = {world.say_fact(fact, wording): fact for fact in world.FACTS
            for wording in range(world.HELD_OUT)}
    action = {world.say_action(action, wording): action for action in world.ACTIONS
              for wording in range(world.HELD_OUT)}
    for document in world.documents(5):
        parts = [part + "." for part in document.rstrip(".").split(". ")]
        middle = next(i for i, part in enumerate(parts) if part in action)
        before, later = ({fact[part][0]: fact[part][1] for part in some}
                         for some in (parts[:middle], parts[middle + 1:]))
        state = world.State(before.pop("robot"), tuple(sorted(
            before.items(), key=lambda pair: world.OBJECTS.index(pair[0]))))
        assert dict(world.step(state, action[parts[middle]]).facts()) == later


def test_sentences_have_one_fact_each():
    """No two facts share a sentence, in any wording."""
    said = [world.say_fact(fact, wording) for fact in world.FACTS
            for wording in range(world.N_WORDINGS)]
    assert len(set(said)) == len(said)


# -- the search ------------------------------------------------------------------------------------
def perfect():
    """A `LatentWorld` whose transition is the true house: the latent of a fact is its one-hot."""
    n = len(world.FACTS)
    facts = torch.eye(n)[:, None].repeat(1, world.N_WORDINGS, 1)
    actions = torch.zeros(len(world.ACTIONS), world.N_WORDINGS, n)
    actions[range(len(world.ACTIONS)), :, range(len(world.ACTIONS))] = 1

    def transition(slots, mask, action):
        """The true next state of each row; the same one without action."""
        rows = []
        for row, used, one in zip(slots, mask, action):
            said = [world.FACTS[i] for i in row[used].argmax(-1).tolist()]
            after = said
            if one.any():
                state = world.State(said[0][1], tuple(said[1:]))
                after = world.step(state, world.ACTIONS[one.argmax()]).facts()
            numbers = [world.NUMBER[fact] for fact in after]
            new = torch.zeros_like(row)
            new[range(len(numbers)), numbers] = 1
            rows.append(new)
        return torch.stack(rows)
    return house.LatentWorld(transition, house.Latents(facts, facts, actions))


@pytest.mark.parametrize("cost", ["closest", "last", "sum"])
def test_with_a_perfect_model_the_search_finds_a_plan(cost):
    """Whatever the cost; the closest approach finds a shortest plan."""
    imagination = perfect()
    goal = ("ball", "hall")
    found, energies = house.search(
        imagination, imagination.begin(START, [0] * 4), imagination.goal(goal, 0), depth=5,
        beam=64, cost=cost)
    states = [START]
    for action in found:
        states.append(world.step(states[-1], world.ACTIONS[action]))
    assert any(goal in state.facts() for state in states)
    assert len(energies) == len(found)
    if cost == "closest":
        assert len(found) == len(world.shortest_plan(START, goal))


def test_states_that_were_imagined_before_are_dropped():
    """One action leads from the hall to three rooms; all other actions change nothing."""
    imagination = perfect()
    begin = imagination.begin(START, [0] * 4)
    after = imagination.expand(begin)
    assert len(after.slots) == len(world.ACTIONS)
    assert imagination.new(after, begin).sum() == 3


def test_tasks_are_held_out_and_as_long_as_they_say(monkeypatch):
    """Starts are not in the text; moves never made there; lengths by the true house."""
    monkeypatch.setattr(house, "TRAJECTORIES", N)
    text = {state for states, _ in world.trajectories(N) for state in states}
    for name, (low, high) in house.BINS.items():
        for task in house.tasks(name, 5, seed=5):
            assert low <= task.shortest <= high
            assert task.start not in text and task.goal not in task.start.facts()
            subject, place = task.goal
            if subject != "robot" and place != world.HAND:
                source = dict(task.start.facts())[subject]
                assert world.held_out_move(subject, source, place)
    assert all(task.goal in world.UNSEEN for task in house.tasks("4_6", 5, unseen=True, seed=5))


def test_the_oracle_succeeds_and_a_robot_that_stands_still_does_not():
    """The two ends of the scale."""
    some = house.tasks("4_6", 5, seed=5)
    assert house.success(house.oracle, some) == 1
    assert house.success(lambda state, goal: ("put", ""), some) == 0


# -- the model -------------------------------------------------------------------------------------
SMALL = dataclasses.replace(planning.BASE, n_embd=16, pred_embd=16, n_layer=1, top_k=1, n_head=2,
                            episodes=2, trajectories=N)


def transition():
    """A random transition model."""
    torch.manual_seed(0)
    return house_model.Transition(SMALL)


def test_a_slot_that_is_not_used_changes_no_other_slot():
    """States of two and of four sentences are read by one model."""
    slots, action = torch.randn(3, 4, 16), torch.randn(3, 16)
    mask = torch.tensor([[True, True, False, False]]).expand(3, -1)
    whole = transition()(slots, mask, action)
    slots[:, 2:] = 7
    assert torch.allclose(transition()(slots, mask, action)[:, :2], whole[:, :2])


def test_the_order_of_sentences_does_not_matter():
    """The slots of a state are a set."""
    slots, action, mask = torch.randn(3, 4, 16), torch.randn(3, 16), torch.ones(3, 4).bool()
    order = [2, 0, 3, 1]
    whole = transition()(slots, mask, action)
    assert torch.allclose(transition()(slots[:, order], mask, action), whole[:, order], atol=1e-6)


def test_without_actions_the_loss_knows_nothing_of_them():
    """The control "no action" gets the same loss whatever was done."""
    states, actions = torch.randint(65, (8, 3, 4)), torch.randint(16, (2, 8, 2))
    table = torch.randn(65, world.N_WORDINGS, 16)
    latents = house.Latents(table, table, torch.randn(16, world.N_WORDINGS, 16))

    class Model:
        """As far as the loss needs one."""
        transition = transition()
    losses = {}
    for given in ("actions", "none"):
        cfg = dataclasses.replace(SMALL, given=given)
        for i, done in enumerate(actions):
            torch.manual_seed(1)
            losses[given, i] = house_model.rollout_loss(Model, cfg, latents, states, done)[0]
    assert losses["none", 0] == losses["none", 1]
    assert losses["actions", 0] != losses["actions", 1]


def test_outcomes_are_drawn_equally_often():
    """An object is put down in a few of the actions of the text and in a sixth of those drawn."""
    torch.manual_seed(0)
    states, actions = house_model.draw_walks(SMALL, 1200)
    changed = (states[:, 0] != states[:, 1]).any(1)
    put = actions[:, 0] == world.ACTIONS.index(("put", ""))
    assert (put & changed).float().mean().item() == pytest.approx(1 / 6, abs=0.04)
    every, taken = house.walks(N)
    changed = (every[:, 1:] != every[:, :-1]).any(-1)
    put = taken == world.ACTIONS.index(("put", ""))
    assert (put & changed).float().mean() < 0.06


def test_without_actions_there_are_none_in_planning_either(monkeypatch):
    """Else the search would imagine what an input does that was never trained."""
    table = torch.randn(65, world.N_WORDINGS, 16)
    latents = house.Latents(table, table, torch.randn(16, world.N_WORDINGS, 16))
    monkeypatch.setattr(house, "latents_of", lambda *arguments: latents)
    monkeypatch.setattr(house_model, "fit", lambda *arguments: None)
    model = SimpleNamespace(cfg=SMALL, context_encoder=None, target_encoder=None)
    run = train.Run(SMALL, model, SimpleNamespace(tokenizer=None), "cpu", torch.float32)
    for given, there in (("actions", True), ("none", False)):
        _, found = house_model.train_frozen(run, dataclasses.replace(SMALL, given=given))
        assert found.actions.any() == there


def test_a_state_is_right_if_each_fact_is_the_nearest_of_its_subject():
    """One wrong slot makes a state wrong; an empty slot does not."""
    table = torch.eye(65)[:, None].repeat(1, world.N_WORDINGS, 1)
    latents = house.Latents(table, table, table)
    facts = torch.tensor([house.numbers(START)])
    slots = torch.eye(65)[facts.clamp(min=0)]
    assert planning.nearest_facts(latents, slots, facts).all()
    slots[0, 1] = torch.eye(65)[world.NUMBER["ball", "porch"]]
    assert planning.nearest_facts(latents, slots, facts).tolist() == [[True, False, True, True]]


def test_an_arm_runs_to_its_figures(tmp_path):
    """Phase 1, transition model, phase 3, search: each figure is a share."""
    cfg = dataclasses.replace(SMALL, pretrain_steps=2, distill_steps=2, speak_steps=2,
                              batch_size=4, qa_batch_size=8, out=str(tmp_path / "lab" / "arm_0"))
    found = planning.measure(cfg)
    assert {"success_1_3", "success_unseen", "spoken_5", "counterfactual"} <= set(found)
    shares = [value for name, value in found.items()
              if name.startswith(("success", "spoken", "nearest"))]
    assert all(0 <= value <= 1 for value in shares)


def test_the_gpt_understands_states_and_drops_what_is_none():
    """Sentences in any trained wording; two places of one object are no state."""
    gpt = GPTWorld.__new__(GPTWorld)
    gpt.known = {world.say_fact(fact, wording): fact for fact in world.FACTS
                 for wording in house.TRAINED}
    random_ = random.Random(0)
    said = world.say_state(START, random_)
    assert gpt.understand(f" {said} Go to", 3) == frozenset(START.facts())
    assert gpt.understand("The ball is in the hall. The ball is in the attic.", 2) == frozenset()
    assert gpt.understand("The ball is in the.", 1) == frozenset()


def test_the_gpt_writes_the_successors_of_a_state_once():
    """A state that is met again has the same successors, and none of another's."""
    gpt = GPTWorld.__new__(GPTWorld)
    gpt.written, asked = {}, []

    def write(states):
        """Successors that name their state."""
        asked.extend(states)
        return [(facts, action) for facts in states for action in world.ACTIONS]
    gpt.write = write
    a, b = frozenset("a"), frozenset("b")
    first = gpt.expand([(a, None), (b, None)])
    assert gpt.expand([(b, None), (a, None)]) == first[16:] + first[:16]
    assert asked == [a, b]
