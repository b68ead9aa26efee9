"""Evaluation: perplexity, bits per byte, tasks. Nothing here imports torch before a model of torch is scored."""

from tulle.evaluate.perplexity import TextScore, evaluate_text, held_out_text
from tulle.evaluate.tasks import TaskScore, evaluate_task
from tulle.evaluate.text import Protocol

__all__ = ["Protocol", "TaskScore", "TextScore", "evaluate_task", "evaluate_text", "held_out_text"]
