"""Training: whole epochs as compiled programs, devices, hosts, streaming, schedules."""
