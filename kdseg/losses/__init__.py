"""Loss terms. Every function here is pure and returns one value an image, [B].

  * what is being trained comes first, what it is compared with second, then
    masks, then `rng`; hyper-parameters are keyword-only;
  * no batch mean, no collective, no config, no weights of terms: `objective`
    does those, once;
  * teacher arguments receive no gradient;
  * arrays are channel-last; B images, H x W pixels, h x w cells, C channels;
  * labels are float, 0 or 1, [B, H, W]; logits hold one number a pixel, the
    lesion's log-odds, [B, H, W];
  * what is computed is float32, whatever comes in;
  * a shape that does not fit raises ValueError when the function is traced.

Weights that a source sums its parts with are hyper-parameters of that loss, the
published ones by default; the weight of the whole is not.

`segmentation` compares with the labels, `logits` with the teacher's logits.
`features` and `attention` compare with the teacher's features, once the
student's are aligned; `relations` compares what features of any width have in
common. `boundary` says where the lesion's edge is. `grids` and `reduce` are
their small common parts. docs/methods.md has all of them on a page.
"""
