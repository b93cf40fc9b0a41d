"""
Do facts taught in latent space become speech, and what is phase 1 worth for it?

    python -m labs.facts                    3 seeds of each arm, about 10 minutes an arm and seed on 2 cores
    python -m labs.facts --fast             does it run?

Expected before the first run: the paper's recipe collapses; a random-init encoder is strong in the phrasings that it was
taught and weak in new ones.
All arms share corpus, width, seeds and the batches of phases 2 and 3. The random-init arm has no phase 1, and so a random
teacher as well. The learning rates are those of the default arm: not tuned an arm.
"""
import dataclasses

import train
from labs.arms import Flags, main, publish, run_arms, table

ARMS = {
    "default": train.Config(),
    "random-init encoder": train.Config(pretrain_steps=0),
    "recipe=paper (phase 1)": train.resolve(dict(recipe="paper", phase="pretrain")),
}
PHASE_1 = {"R2": "val_r2", "rank / 128": "rank", "health": "health", "capital by energy (chance .025)": "cloze_capital",
           "among all of the world (.0055)": "cloze_capital_all"}
R1 = {f"R@1 {split}, {phrasing}": f"r1_{split}{tail}" for split in ("DEC", "LAT")
      for phrasing, tail in (("trained", ""), ("held-out", "_heldout"))}
EM = {f"{split} {phrasing}": f"em_{split}{tail}" for split in ("DEC", "LAT", "TXT")
      for phrasing, tail in (("trained", ""), ("held-out", "_heldout"))} | {"memory shuffled": "em_shuffled"}
NEVER = {"answered with I don't know": "abstain", "AUROC": "auroc"}


def facts(flags):
    """Run the arms, write the tables."""
    few = dict(pretrain_steps=4, distill_steps=4, speak_steps=4) if flags.fast else {}
    arms = {name: dataclasses.replace(cfg, **{steps: min(few.get(steps, 10 ** 9), getattr(cfg, steps)) for steps in (
        "pretrain_steps", "distill_steps", "speak_steps")}) for name, cfg in ARMS.items()}
    rows = run_arms("facts", arms, flags)
    text = "\n\n".join(f"{title}\n\n{table(rows, arms, columns)}" for title, columns in (
        ("Phase 1:", PHASE_1), ("R@1 of the thought after phase 2:", R1), ("Exact match of greedy speech:", EM),
        ("Invented subjects, at the threshold that keeps 95 % of DEC held-out:", NEVER)))
    publish("facts", rows, text, flags.table)


if __name__ == "__main__":
    main(facts)
