"""What a terminal says of a step."""

from fastsmart.run.display import summary


def test_a_step_that_samples_nothing_has_no_rates():
    line = {"reward": 6.1234, "notes": 65.6, "kl": 0.05, "kl_per_completion": 12.345, "entropy": None}
    idle, busy = ({"tokens_per_s": tokens, "clips_per_s": clips} for tokens, clips in ((0.0, 0.0), (812.4, 3.26)))
    assert summary(line | {"time": idle}) == "reward 6.123  kl 0.050  (12.35 nats/clip)  66 notes/clip"
    assert summary(line | {"time": busy}).endswith("66 notes/clip  812 tokens/s  3.3 clips/s")
