#!/usr/bin/env bash
# Every command behind results/, in the order in which they ran. ARCHIVES is the
# folder with the official archives. results/README.md says what each took, and
# with which of the two trainings of the teacher.
set -euo pipefail
: "${ARCHIVES:?the folder with the official archives}"

python -m kdseg.main --config configs/isic2016.py:search --workdir \
  runs/search --config.data.manual_dir="$ARCHIVES" \
  --config.training.learning_rate=3e-3 \
  --config.arms.patch_unet_50k.seeds="()" \
  --config.arms.patch_unet_12k.seeds="(0,)"
python -m kdseg.main --config configs/isic2016.py --workdir runs/isic2016 \
  --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_50k.seeds="(0,1)" \
  --config.arms.patch_unet_12k.seeds="(0,1)"
python -m kdseg.main --config configs/isic2016.py --workdir runs/isic2016-s2 \
  --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_50k.seeds="(2,)" \
  --config.arms.patch_unet_12k.seeds="(2,)"
python -m kdseg.main --config configs/isic2016.py:comparison --workdir \
  runs/a --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_12k.methods="('fitnet','generator','mgd','mgd_matched','rolled_band')" \
  --config.arms.patch_unet_12k.seeds="(0,1,2)"
python -m kdseg.main --config configs/isic2016.py:comparison --workdir \
  runs/b --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_12k.methods="('none','mbf','m2bf','mgd','rolled_band')" \
  --config.arms.patch_unet_12k.seeds="(3,4)"
python -m kdseg.main --config configs/isic2016.py:comparison --workdir \
  runs/d --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_12k.methods="('fitnet','generator','mgd_matched')" \
  --config.arms.patch_unet_12k.seeds="(3,4)"
python -m kdseg.main --config configs/isic2016.py:comparison --workdir \
  runs/c2 --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_12k.methods="('kd','cwd','dist','at','bpkd')" \
  --config.arms.patch_unet_12k.seeds="(0,1,2)"
python -m kdseg.main --config configs/isic2016.py:comparison --workdir \
  runs/f1 --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_12k.methods="('skd_pa','maskd','emkd')" \
  --config.arms.patch_unet_12k.seeds="(0,1,2)"
python -m kdseg.main --config configs/isic2016.py:comparison --workdir \
  runs/g1 --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_12k.methods="('m2bf_4','wide')" \
  --config.arms.patch_unet_12k.seeds="(0,1,2)"
python -m kdseg.main --config configs/isic2016.py:comparison --workdir \
  runs/f2 --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_12k.methods="('fgd','ifvd','ultralbm')" \
  --config.arms.patch_unet_12k.seeds="(0,1,2)"
python -m kdseg.main --config configs/isic2016.py:comparison --workdir \
  runs/i1 --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_12k.methods="('m2bf_2','parallel')" \
  --config.arms.patch_unet_12k.seeds="(0,1,2)" \
  --config.evaluation.teacher_tta=none
python -m kdseg.main --config configs/isic2016.py:comparison --workdir \
  runs/i2 --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_12k.methods="('interior','exterior','inv_band')" \
  --config.arms.patch_unet_12k.seeds="(0,1,2)" \
  --config.evaluation.teacher_tta=none
python -m kdseg.main --config configs/isic2016.py:comparison --workdir \
  runs/i3 --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_12k.methods="('multiscale',)" \
  --config.arms.patch_unet_12k.seeds="(0,1,2)" \
  --config.evaluation.teacher_tta=none
python -m kdseg.main --config configs/isic2016.py:comparison --workdir \
  runs/i4 --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_12k.methods="('cirkd_lite',)" \
  --config.arms.patch_unet_12k.seeds="(0,1,2)" \
  --config.evaluation.teacher_tta=none
python -m kdseg.main --config configs/isic2016.py:comparison --workdir \
  runs/q1 --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_12k.methods="('mbf_all_hidden',)" \
  --config.arms.patch_unet_12k.seeds="(0,1,2,3,4)" \
  --config.evaluation.teacher_tta=none
python -m kdseg.main --config configs/isic2016.py:comparison --workdir \
  runs/h5 --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_12k.methods="('m2bf_2','m2bf_4','parallel','wide','multiscale')" \
  --config.arms.patch_unet_12k.seeds="(3,4)" \
  --config.evaluation.teacher_tta=none
python -m kdseg.main --config configs/isic2016.py:comparison --workdir \
  runs/h6 --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_12k.methods="('shuffled','smoothing','teacher_band','no_generator')" \
  --config.arms.patch_unet_12k.seeds="(0,1,2)" \
  --config.evaluation.teacher_tta=none
python -m kdseg.main --config configs/isic2016.py:comparison --workdir \
  runs/j1 --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_12k.methods="('interior','exterior','inv_band','teacher_band','no_generator','shuffled')" \
  --config.arms.patch_unet_12k.seeds="(3,4)" \
  --config.evaluation.teacher_tta=none
python -m kdseg.main --config configs/isic2016.py:comparison --workdir \
  runs/j2 --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_12k.methods="('smoothing','kd','cwd','dist','at','bpkd','skd_pa')" \
  --config.arms.patch_unet_12k.seeds="(3,4)" \
  --config.evaluation.teacher_tta=none
python -m kdseg.main --config configs/isic2016.py:comparison --workdir \
  runs/j3 --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_12k.methods="('maskd','emkd','fgd','ifvd','ultralbm','cirkd_lite')" \
  --config.arms.patch_unet_12k.seeds="(3,4)" \
  --config.evaluation.teacher_tta=none
python -m kdseg.main --config configs/isic2016.py:comparison --workdir \
  runs/j4 --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_12k.methods="('band_loss',)" \
  --config.arms.patch_unet_12k.seeds="(0,1,2,3,4)" \
  --config.evaluation.teacher_tta=none
python -m kdseg.main --config configs/isic2016.py:random --workdir runs/rt \
  --config.data.manual_dir="$ARCHIVES" --config.evaluation.teacher_tta=none
python -m kdseg.report runs/b runs/isic2016 runs/isic2016-s2 runs/a runs/d \
  runs/c2 runs/f1 runs/g1 runs/f2 runs/i1 runs/i2 runs/i3 runs/i4 runs/q1 \
  runs/h5 runs/h6 runs/j1 runs/j2 runs/j3 runs/j4 runs/rt --out \
  results/isic2016
python -m kdseg.main --config configs/isic2016.py:why --workdir runs/why-mbf \
  --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_12k.methods="('none','mbf','mbf_weak','mbf_strong','mbf_narrow','mbf_broad','mbf_all_hidden','band_loss')" \
  --config.evaluation.teacher_tta=none
python -m kdseg.main --config configs/isic2016.py:why --workdir \
  runs/why-m2bf --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_12k.methods="('m2bf','m2bf_weak','m2bf_strong')" \
  --config.evaluation.teacher_tta=none
python -m kdseg.main --config configs/isic2016.py:why --workdir \
  runs/why-taps-0 --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_12k.methods="('mbf_low','mbf_both')" \
  --config.arms.patch_unet_12k.seeds="(0,)" \
  --config.evaluation.teacher_tta=none
python -m kdseg.main --config configs/isic2016.py:why --workdir \
  runs/why-taps-1 --config.data.manual_dir="$ARCHIVES" \
  --config.arms.patch_unet_12k.methods="('mbf_low','mbf_both')" \
  --config.arms.patch_unet_12k.seeds="(1,)" \
  --config.evaluation.teacher_tta=none
python -m kdseg.report runs/why-mbf runs/why-m2bf runs/why-taps-0 \
  runs/why-taps-1 --out results/isic2016-why
