"""One-device maths of a DeepSeek-V3-class transformer: no mesh, no process group, no rank."""
