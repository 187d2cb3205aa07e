"""Whether a model can be tuned on a machine, with which settings and in what time: said before anything is loaded."""
