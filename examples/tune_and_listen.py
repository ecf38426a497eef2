"""Tune the shipped piano model by the demo's rewards, then write a piece by the tuned model to hear.

python examples/tune_and_listen.py                       # some six minutes on two CPU cores
python examples/tune_and_listen.py train.steps=5         # any section.key=value of the configuration
"""

import sys

import fastsmart as fs
from fastsmart.config import with_overrides

OUT = "runs/tuned"

if __name__ == "__main__":
    config = with_overrides(fs.presets.demo(), sys.argv[1:])
    run = fs.train(config, out=OUT)
    if run.exit_code:  # Ctrl-C or SIGTERM ends the training; the rest of a script would go on
        sys.exit(run.exit_code)
    if run.before and run.after:
        print(f"held-out reward {run.before['reward']['mean']:.2f} -> {run.after['reward']['mean']:.2f}")

    prompts = fs.prompts.procedural(run.policy.vocab, 1, seed=0, time_signatures=["4/4"])
    rollout = fs.sample(run.policy, prompts, max_tokens=config.sampling.max_tokens, seed=1)
    notes = fs.decode(rollout.sequences(), run.policy.vocab, max_seconds=30.0)
    notes.to_midi(0, f"{OUT}/piece.mid")
    fs.render(notes, backend="fluidsynth", sample_rate=48000, max_seconds=30.0).to_wav(0, f"{OUT}/piece.wav")
    print(f"listen to {OUT}/piece.wav and to the same prompts before and after in {OUT}/listen")
