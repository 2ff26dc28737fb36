"""What a model is trained for: `objective(stats, batch, config) -> {"loss": Mean, ...}`, pure, by name.

An objective never calls the model, sees a mesh, or divides by a batch size; whatever it reads beyond the token
statistics is a column of the batch.
"""

from ringbpt.objectives import sft

OBJECTIVES = {"sft": sft.objective}
