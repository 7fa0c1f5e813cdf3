"""How good a trained model is: perplexity, questions with choices, and the evaluation harness's tasks."""
