"""Presets, one YAML file each; the folder is package data of vllm_kvcompress."""
