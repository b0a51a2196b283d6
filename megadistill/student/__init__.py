"""The student: a Hugging Face model under ZeRO-3. The only room that knows deepspeed."""
