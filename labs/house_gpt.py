"""A GPT as a world model of the house: it writes the next state, and judges goals by likelihood."""
import torch

from data.house import prepare as world
from labs import house
from labs.controls import read_gpt

class GPTWorld:
    """States are imagined as text; the interface is that of `house.LatentWorld`.

    A state is a list of facts, said in the first wording. The GPT reads state and action and
    writes the next state, greedily. What it writes is understood in any trained wording and said
    again in the first one: equal states are then equal texts. One that is no state is dropped.

    The energy of a state is minus the log-likelihood of the goal's sentence right after the state
    and the action that led to it. In the text the order and the wording of sentences are random,
    so that a true goal has about 1 / (sentences * wordings).
    """
    tolerance = 0.5

    def __init__(self, run):
        self.model = run.model
        self.tokenizer = run.corpus.tokenizer
        self.reached = 5.0              # a true goal has about log(4 * 5) = 3.0
        # facts of a state -> what was written after each action: an episode meets a state often
        self.written = {}
        self.known = {world.say_fact(fact, wording): fact for fact in world.FACTS
                      for wording in house.TRAINED}

    @classmethod
    def trained(cls, cfg, corpus):
        """A GPT of the encoder's size that reads the text of phase 1."""
        return cls(read_gpt(cfg, corpus))

    def begin(self, state, wordings):
        """The state, and the text that led to it: none."""
        return [(frozenset(state.facts()), None)]

    def goal(self, fact, wording):
        """The goal's sentence."""
        return " " + world.say_fact(fact, wording)

    def prompt(self, facts, action):
        """Tokens of a state and an action, after [BOS]."""
        said = [world.say_fact(fact) for fact in sorted(facts, key=world.NUMBER.get)]
        text = " " + " ".join([*said, world.say_action(action)])
        return [self.model.cfg.bos, *self.tokenizer.encode(text)]

    @torch.no_grad()
    def expand(self, states):
        """Each state after each action; a state that can't be understood has no facts."""
        new = list(dict.fromkeys(facts for facts, _ in states if facts not in self.written))
        written, n_actions = self.write(new), len(world.ACTIONS)
        for i, facts in enumerate(new):
            self.written[facts] = written[i * n_actions:(i + 1) * n_actions]
        return [found for facts, _ in states for found in self.written[facts]]

    def write(self, states):
        """The next state, as facts and the prompt that led to it, for each state and action."""
        prompts = [self.prompt(facts, action) for facts in states for action in world.ACTIONS]
        n_facts = [len(facts) for facts in states for _ in world.ACTIONS]
        written = [None] * len(prompts)
        # prompts of equal length are continued together: nothing is padded
        for length in {len(prompt) for prompt in prompts}:
            which = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
            tokens = torch.tensor([prompts[i] for i in which])
            longest = 10 * max(n_facts[i] for i in which)
            for i, row in zip(which, self.model.generate(tokens, longest).tolist()):
                written[i] = self.understand(self.tokenizer.decode(row), n_facts[i])
        return list(zip(written, prompts))

    def understand(self, text, n):
        """The facts of the first n sentences of a text; none if one is no fact."""
        parts = [part.strip() + "." for part in text.split(".")[:n]]
        found = frozenset(self.known.get(part) for part in parts)
        whole = None not in found and len({subject for subject, _ in found}) == n
        return found if whole else frozenset()

    @torch.no_grad()
    def energy(self, states, goal):
        """Minus the log-likelihood of the goal's sentence after each state's prompt: (n,)."""
        energy = torch.full((len(states),), torch.inf)
        ids = self.tokenizer.encode(goal)
        for length in {len(prompt) for facts, prompt in states if facts and prompt}:
            which = [i for i, (facts, prompt) in enumerate(states)
                     if facts and len(prompt) == length]
            tokens = torch.tensor([states[i][1] + ids for i in which])
            logits = self.model.say(self.model.states(tokens[:, :-1]))[:, length - 1:]
            logp = logits.log_softmax(-1).gather(-1, tokens[:, length:, None])[..., 0]
            energy[which] = -logp.sum(1)
        return energy

    def take(self, states, which):
        """Some of the states."""
        return [states[i] for i in which.tolist()]

    def join(self, states, others):
        """Two sets of states as one."""
        return states + others

    def new(self, states, known=None):
        """Which states differ from all before them, and from the known ones: bool (n,)."""
        seen = {facts for facts, _ in known or []} | {frozenset()}
        first = []
        for facts, _ in states:
            first.append(facts not in seen)
            seen.add(facts)
        return torch.tensor(first)

    def policy(self, seed=0):
        """It searches as `house.planner` does; states and goals have the first wording."""
        return house.planner(self, [0], seed=seed)
