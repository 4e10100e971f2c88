"""The denoising loop and its plug-ins: decoding rules, schedules, token sampling. Makes Trajectories."""
