"""A GPT as a world model of the house: it writes the next state, and judges goals by likelihood."""
import torch

from data.house import prepare as world
from labs import house

class GPTWorld:
    """States are imagined as text by the GPT of a run; an interface as of `house.LatentWorld`.

    The GPT reads a state, in the first wording, and an action, and writes the next state, greedily.
    It is understood in any trained wording; what is no state is dropped. An imagined state is a
    pair: its facts, and the prompt that led to it. Its energy is minus the log-likelihood of the
    goal's sentence after the prompt. In the text order and wording of the sentences are random.
    """
    tolerance = 0.5
    reached = 5.0       # a true goal has about log(sentences * wordings) = log(4 * 5) = 3.0

    def __init__(self, run):
        self.model = run.model
        self.tokenizer = run.corpus.tokenizer
        # facts of a state -> what was written after each action: an episode meets a state often
        self.written = {}
        self.known = {world.say_fact(fact, wording): fact for fact in world.FACTS
                      for wording in house.TRAINED}

    def begin(self, state, wordings):
        """The state, to which no prompt led."""
        return [(frozenset(state.facts()), None)]

    def goal(self, fact, wording):
        """The goal's sentence."""
        return " " + world.say_fact(fact, wording)

    def expand(self, states):
        """Each state after each action; a state that can't be understood has no facts."""
        new = list(dict.fromkeys(facts for facts, _ in states if facts not in self.written))
        written = iter(self.write(new))
        for facts in new:
            self.written[facts] = [next(written) for _ in world.ACTIONS]
        return [found for facts, _ in states for found in self.written[facts]]

    def write(self, states):
        """The states that follow n sets of facts, after each action: a list of n * A."""
        prompts, n_facts = [], []
        for facts in states:
            said = [world.say_fact(fact) for fact in sorted(facts, key=world.NUMBER.get)]
            for action in world.ACTIONS:
                text = " " + " ".join([*said, world.say_action(action)])
                prompts.append([self.model.cfg.bos, *self.tokenizer.encode(text)])
                n_facts.append(len(facts))
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
        for length in {len(prompt) for facts, prompt in states if facts}:
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
