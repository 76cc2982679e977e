"""Every check before the first training step, one module per question.

- config: does the config name parts that exist, and a meta-architecture that distils?
- data, annotations: are the datasets there, sound, and what the model needs?
- classes: do teacher, student and datasets mean the same classes in the same order?
- pixel_statistics: are images normalised by the mean and standard deviation that belong to them?
- evaluation: can the evaluation that the config asks for be run after the training?
- resume: may this training write into its output folder, and is it the run that was meant?

Whether a distiller fits student and teacher is checked where both are built,
``kd_detectron.modeling.compatibility``; a distiller's options where it is built.
"""
