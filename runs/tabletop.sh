#!/usr/bin/env bash
# The tabletop models, from nothing: demonstrations, image tokenizer, policy, two rounds of DAgger on the states that
# the policy itself visits, then the world model, each trained on from the one before; $OUT/shipped is the
# last. Two CPU cores: about thirteen hours of training, and the collecting. Run it again after a stop: finished steps
# are skipped. Training runs as two processes of one thread that share every batch.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

OUT=out/tabletop    # the recipes read this folder
SUITES="tabletop_spatial tabletop_object tabletop_goal tabletop_long"

tokens() {  # demonstrations, store
    worldvla tokenize "$1" --tokenizer $OUT/image_tokenizer --out "$2"
}
train() {  # recipe, exported model
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m worldvla train "$1" --out $OUT/run_"$1" \
        --train.num-threads 1 --train.compile
    worldvla export $OUT/run_"$1" --out "$2"
}
visit() {  # round, policy, episodes of a task: its states, labelled by the expert
    for suite in $SUITES; do
        worldvla collect "$suite" --out $OUT/dagger"$1"/"$suite" --policy "$2" --episodes "$3" --seed "$1" --label 5 --execute 3
        tokens $OUT/dagger"$1"/"$suite" $OUT/dagger"$1"_"$suite"
    done
}

for suite in $SUITES; do
    worldvla collect "$suite" --out $OUT/demos/"$suite" --episodes 100 --label 5
    worldvla replay $OUT/demos/"$suite"
done
[ -e $OUT/image_tokenizer/report ] || worldvla train-tokenizer $OUT/demos --out $OUT/image_tokenizer --steps 2056
python -m paper.probe $OUT/image_tokenizer $OUT/demos/tabletop_{object,goal,spatial} --steps 600    # do the codes hold what the hand needs?
for suite in $SUITES; do
    tokens $OUT/demos/"$suite" $OUT/store_"$suite"
done

train tabletop $OUT/first
visit 1 $OUT/first 40    # for the shipped model 60 of tabletop_spatial
train tabletop_dagger1 $OUT/second
visit 2 $OUT/second 40
train tabletop_dagger2 $OUT/model

for suite in $SUITES; do    # initial states 10 to 19 of each task: none of them was used before
    worldvla eval $OUT/model --suite "$suite" --first 10 --episodes 10 --execute 3 --videos 0
    worldvla collect "$suite" --out $OUT/held_out/"$suite" --episodes 1 --seed 9 --tasks 0 3
done
worldvla eval-world $OUT/model --demos $OUT/held_out --clips 8 --horizons 30 --shorter

# The world model: data in which grasps slip and things are pushed, codes of eight dims, then both kinds of samples.
for suite in $SUITES; do
    worldvla collect "$suite" --out $OUT/world/"$suite" --kind world --episodes 75 --policy $OUT/model --seed 20
    worldvla collect "$suite" --out $OUT/visited/"$suite" --policy $OUT/model --episodes 24 --seed 11 --label 5 --execute 3
    worldvla collect "$suite" --out $OUT/expert/"$suite" --episodes 12 --seed 12 --label 5
done
[ -e $OUT/levels/report ] || worldvla train-tokenizer $OUT/world --levels --out $OUT/levels --steps 2500
for suite in $SUITES; do
    for kind in world visited expert; do
        worldvla tokenize $OUT/$kind/"$suite" --tokenizer $OUT/levels --out $OUT/levels_${kind}_"$suite"
    done
done
worldvla config tabletop_world > $OUT/tabletop_world.json
[ -e $OUT/grown ] || python -m paper.grow --old $OUT/model --config-file $OUT/tabletop_world.json --demos $OUT/world --out $OUT/grown
train tabletop_world $OUT/first_world
train tabletop_world2 $OUT/second_world
train tabletop_world3 $OUT/world_model
train tabletop_state $OUT/state
train tabletop_anchor $OUT/anchor_model

more() {  # round, model, seeds: new data that this model collects
    for suite in $SUITES; do
        worldvla collect "$suite" --out $OUT/world"$1"/"$suite" --kind world --episodes 50 --policy "$2" --seed "$3"
        worldvla collect "$suite" --out $OUT/visited"$1"/"$suite" --policy "$2" --episodes 14 --seed "$4" --label 5 --execute 3
        worldvla collect "$suite" --out $OUT/expert"$1"/"$suite" --episodes 10 --seed "$5" --label 5
        for kind in world visited expert; do
            worldvla tokenize $OUT/$kind"$1"/"$suite" --tokenizer $OUT/levels --out $OUT/levels_${kind}"$1"_"$suite"
        done
    done
}
more 2 $OUT/anchor_model 41 43 45
train tabletop_sampled $OUT/sampled_model
train tabletop_at_once $OUT/at_once_model
train tabletop_deep $OUT/deep_model

# And on what that model imagines in place of new data.
more 3 $OUT/deep_model 51 53 55
for suite in $SUITES; do
    [ -e $OUT/imagined3_"$suite" ] || worldvla imagine $OUT/levels_world3_"$suite" --world $OUT/deep_model --out $OUT/imagined3_"$suite" --dtype auto
done
train tabletop_imagined $OUT/imagined_model

# Once more, with hands that act beside the things and a weaker policy; the weights halfway are the shipped ones.
[ -e $OUT/noisy ] || python -m paper.noisy $OUT/imagined_model --levels 0.4 --out $OUT/noisy
for suite in $SUITES; do
    worldvla collect "$suite" --out $OUT/world4/"$suite" --kind world --episodes 40 --policy $OUT/noisy/noise_0.4 --seed 61
    worldvla collect "$suite" --out $OUT/visited4/"$suite" --policy $OUT/imagined_model --episodes 10 --seed 63 --label 5 --execute 3
    worldvla collect "$suite" --out $OUT/expert4/"$suite" --episodes 10 --seed 55 --label 5
    for kind in world visited expert; do
        worldvla tokenize $OUT/${kind}4/"$suite" --tokenizer $OUT/levels --out $OUT/levels_${kind}4_"$suite"
    done
    [ -e $OUT/imagined4_"$suite" ] || worldvla imagine $OUT/levels_world4_"$suite" --world $OUT/imagined_model --out $OUT/imagined4_"$suite" --dtype auto
done
train tabletop_astray $OUT/astray_model
[ -e $OUT/halfway ] || python -m paper.average $OUT/imagined_model $OUT/astray_model --out $OUT/halfway

# At last, hands that close on things and beside them.
[ -e $OUT/noisy5 ] || python -m paper.noisy $OUT/halfway --levels 0.4 --out $OUT/noisy5
for suite in $SUITES; do
    worldvla collect "$suite" --out $OUT/grasps5/"$suite" --kind grasps --episodes 60 --seed 81
    worldvla collect "$suite" --out $OUT/visited5/"$suite" --policy $OUT/halfway --episodes 6 --seed 83 --label 5 --execute 3
    for kind in grasps visited; do
        worldvla tokenize $OUT/${kind}5/"$suite" --tokenizer $OUT/levels --out $OUT/levels_${kind}5_"$suite"
    done
done
for suite in tabletop_spatial tabletop_object tabletop_goal; do
    worldvla collect "$suite" --out $OUT/world5/"$suite" --kind world --episodes 40 --policy $OUT/noisy5/noise_0.4 --seed 71
    worldvla tokenize $OUT/world5/"$suite" --tokenizer $OUT/levels --out $OUT/levels_world5_"$suite"
done
[ -e $OUT/imagined5_tabletop_spatial ] || worldvla imagine $OUT/levels_grasps5_tabletop_spatial --world $OUT/halfway \
    --out $OUT/imagined5_tabletop_spatial --dtype auto
train tabletop_grasps $OUT/grasps_model
[ -e $OUT/shipped ] || python -m paper.average $OUT/halfway $OUT/grasps_model --out $OUT/shipped
for suite in $SUITES; do
    worldvla eval $OUT/shipped --suite "$suite" --first 10 --episodes 10 --execute 3 --videos 0
    worldvla collect "$suite" --out $OUT/held_out5/"$suite" --kind world --episodes 2 --policy $OUT/noisy5/noise_0.4 --seed 99
done
worldvla eval-world $OUT/shipped --demos $OUT/held_out5 --clips 64 --horizons 10 30
