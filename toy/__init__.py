"""The embedded default: a world of moving shapes and the tiny Qwen2.5-VL that is trained in it."""
