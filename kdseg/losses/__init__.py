"""Loss terms. Every function here is pure and returns one value an image, [B].

  * what is being trained comes first, what it is compared with second, then
    masks, then `rng`; hyper-parameters are keyword-only;
  * no batch mean, no collective, no config, no weights of terms: those are in
    `kdseg.distill.objective` alone;
  * teacher arguments receive no gradient;
  * arrays are channel-last; B images, H x W pixels, h x w cells, C channels;
  * labels are float, 0 or 1, [B, H, W]; logits hold one number a pixel, the
    lesion's log-odds, [B, H, W];
  * results are float32, whatever the type of the arguments;
  * a shape that does not fit raises ValueError when the function is traced.

Weights that a source sums its parts with are hyper-parameters of that loss, the
published ones by default; the weight of the whole is not.

`segmentation` compares with the labels, `logits` with the teacher's logits.
`mbf`, `features` and `attention` compare with the teacher's features, once the
student's are aligned: `masking` hides cells and measures the error. `relations`
compares what features of any width have in common. `boundary` marks the
lesion's edge. `grids` and `reduce` hold small common parts. docs/methods.md
describes every term on one page.
"""
