"""Methods that act while a model trains: masks, straight-through estimators, distillation, sparse inputs."""
