"""The server: OpenAI's and Anthropic's HTTP interfaces on the engine. No torch, no transformers.

A request's way: :mod:`tulle.serve.security` bounds and parses its body, :mod:`tulle.serve.schemas` checks it, a route
makes engine requests of it (:mod:`tulle.serve.generation`), the engine's thread runs them (:mod:`tulle.serve.worker`),
and what each step gave goes back as JSON or as server-sent events (:mod:`tulle.serve.streaming`).
"""
