"""An OpenAI-compatible server over `drllm_fast.generation.Engine`; its parts need the extra `serve`."""
