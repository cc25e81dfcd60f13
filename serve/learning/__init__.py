"""Learning a concept from pictures: textual inversion (Gal et al. 2022, https://arxiv.org/abs/2208.01618).

The model stays as it is. All that learns are a few vectors in the place of words, so that the model draws the pictures
when it reads them.
"""
