"""How does a video file become the frames and patches that the model sees?"""
