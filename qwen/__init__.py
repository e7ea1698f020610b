"""What is done to Hugging Face's Qwen-VL?

Load, check and save a checkpoint; compute a prompt once for all its answers; LoRA.
"""
