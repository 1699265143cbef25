"""Devices: processes and meshes, placement of arrays, compiled programs, and program variants for CPUs."""
