"""Synthetic triage notes for the text example of ``cenacle demo serving``.

All were written for this demonstration: no patient ever said them, and nobody should decide by a
model that learnt from them.
"""

from __future__ import annotations

from typing import Final

__all__ = ["ROUTINE", "URGENT"]

_URGENT: Final = """\
crushing chest pain for twenty minutes, spreading to the left arm
cannot breathe lying flat, lips look blue
sudden weakness of the right side and slurred speech
worst headache of her life, came like a thunderclap
unconscious after a fall from a ladder
swallowed a whole bottle of tablets an hour ago
throat swelling after a bee sting, voice hoarse
bleeding heavily from the thigh, cloth soaked through
seizure that has not stopped for ten minutes
infant with fever and a stiff neck, very drowsy
vomiting blood since this morning, dizzy on standing
diabetic, confused, sweating and shaking
severe belly pain, rigid abdomen, pale and cold
baby is not waking for feeds and breathes fast
stabbed in the chest, short of breath
sudden loss of vision in one eye
pregnant, heavy bleeding and strong cramps
choking on food, can only whisper
burn over the whole arm from boiling oil
collapsed during football, no pulse felt at first
asthma attack, inhaler does not help any more
black tarry stools and fainting today
new paralysis of both legs since last night
purple rash that does not fade under glass, high fever
electric shock at work, heart beating irregularly
hit by a car, cannot move the left leg, bone visible
says he will kill himself tonight and has a plan
carbon monoxide alarm, whole family has headache and nausea
sudden tearing pain between the shoulder blades
one leg swollen, now chest pain and fast breathing
drowning, pulled from the pool, coughing up water
eye splashed with caustic cleaner, severe pain
heart racing at 180, feels faint
newborn is yellow, limp and will not drink
face drooping on one side since breakfast
temperature of 41 and confused, no urine since yesterday
severe allergic reaction, hives and wheezing
head injury, vomiting repeatedly and drowsy
fingers cut off by a saw
oxygen saturation 82 percent at home
chemotherapy last week, shaking chills and fever
sudden testicular pain, vomiting
child swallowed a button battery
stroke symptoms started thirty minutes ago
insulin pump failed, vomiting, deep breathing, sugar over 500
gunshot wound to the abdomen
waters broke, the cord is hanging out
pain behind the breastbone with cold sweat and nausea
cannot be woken after drinking a bottle of vodka
airway burn after a house fire, soot around the nose
pressure in the chest when resting, getting worse by the minute
blood pressure 70 over 40, skin cold and clammy
sudden confusion and fever in an old woman with a catheter
snake bite on the hand, swelling up to the elbow
toddler drank drain cleaner
severe shortness of breath, coughing pink froth
neck broken perhaps, numb hands after diving into shallow water
spurting blood from the wrist
twitching all over and then unresponsive
trouble swallowing, drooling, leaning forward to breathe
lost consciousness twice today, pacemaker patient
sudden severe pain in the calf, the foot is cold and white
child limp and grey after a long fit
overdose of sleeping pills, barely breathing
postpartum, soaking a pad every ten minutes
crushed under a tractor, legs numb
meningitis contact, now fever, headache and rash
transplant patient with high fever and rigors
smoke inhalation, hoarse and wheezing
threatens others with a knife, hears voices
acute pain in one eye, sees halos, vomiting
blue lips in a three week old
stopped breathing for a few seconds twice
ruptured aneurysm suspected, back pain and collapse
severe dehydration, no tears, sunken eyes, sleepy infant
cardiac arrest, bystanders are resuscitating
amputated toe, heavy bleeding
heat stroke, hot dry skin, talking nonsense
sepsis suspected, fast pulse, mottled skin
anaphylaxis after peanuts, adrenaline given once
sudden deafness and spinning, cannot walk straight, double vision
blood thinner and a hard blow to the head
pneumothorax before, same stabbing pain, breathless
hanging attempt, cut down by his brother
opioid overdose, pinpoint pupils, slow breathing
tongue swelling after a new blood pressure pill
severe pain and no pulse in the arm after a fracture
preterm labour at thirty weeks, contractions every three minutes
eclampsia, fit in late pregnancy
coughing up cups of bright red blood
child trapped in a hot car, not responding
deep bite to the neck by a large dog
suddenly cannot speak, understands everything
hypothermia, found outside, stiff and hardly breathing
potassium of seven on the blood test, muscle weakness
lung cancer patient, face and neck suddenly swollen
abdominal pain, missed period, fainted twice
shunt blocked, headache, vomiting, drowsy
arm hit by high voltage, black entry wound
necrotising wound, skin black and pain spreading by the hour
"""

_ROUTINE: Final = """\
repeat prescription for blood pressure tablets
itchy dry skin on both elbows for some weeks
wants a sick note for a cold that is getting better
routine check of cholesterol, no complaints
mild sore throat, no fever, eats and drinks
ingrown toenail, a little red
travel vaccination for a holiday in spring
wart on the finger, would like it removed
annual diabetes review, sugars well controlled
lower back ache after gardening, walks normally
hay fever, asks for nasal spray
form for a driving licence needs a signature
acne on the face, creams from the shop did not help
wants to stop smoking and asks for advice
earwax, hears a bit worse on one side
knee aches on stairs, for a year
follow-up after a healed wrist fracture
contraceptive pill renewal
mild constipation, eats little fibre
asks for a referral to physiotherapy
small bruise after bumping into a table
dandruff and itchy scalp
flu jab appointment
snoring, partner is annoyed
hearing aid battery question
tired in the evenings, sleeps late
heartburn after spicy food, goes away by itself
stitches to be taken out on Thursday
blister from new shoes
runny nose for three days, otherwise fine
wants blood group for a sports club
wrist brace is too large, needs another size
mole unchanged for years, wants it looked at some time
mild headache after a long day at the screen
asks whether vitamin D is useful
nail fungus on one toe
cold sore on the lip, has them every winter
growth check of a healthy toddler
letter for the insurance about last year
needs new glasses, cannot read small print
stiff neck after sleeping badly
dry eyes at the computer
wants to discuss weight and diet
allergy test results, no symptoms now
mild nappy rash, baby is content
varicose veins, wonders about stockings
old scar is a bit itchy
jet lag after returning from Japan
medication list needs an update
routine thyroid blood test
bunion hurts in tight shoes
stuffy nose at night
asks for advice on a healthy breakfast
callus on the heel
school needs a certificate of vaccination
mild muscle soreness after the gym
slight cough left over from a cold, better each day
blood donation question
lost the vaccination card
sleep hygiene advice wanted
change of address and of family doctor
mouth ulcer, small, third day
routine smear test is due
mosquito bites on the ankles
wants to know the result of a normal x-ray
pregnancy planning, asks about folic acid
cracked lips in winter
mild tennis elbow, comes and goes
compression stockings need replacing
chapped hands from washing dishes
pollen season, itchy eyes
flat feet, asks about insoles
hiccups yesterday, gone today
child with head lice, needs shampoo
blood pressure slightly high at the pharmacy, feels well
splinter in the thumb, already out
tetanus booster is due
mild hangover
asks for a copy of the records
physiotherapy finished, final report
bored of diet drinks, asks about sweeteners
skin tag on the neck
toothache advice: which dentist is open on Monday
travel sickness tablets for a ferry
night cramps in the calf now and then
shoulder stiff in the mornings for months, unchanged
menopause, wants information leaflets
mild sunburn on the shoulders
hair loss since last year
routine visit, feels fine
foot fungus between the toes
discussion of blood results, all normal
asthma review, no attacks this year
gap in vaccinations before starting a new job
wants ear piercing advice
slight ringing in the ears after a concert last month
mild bloating after beans
glasses prescription for the insurance
question about the dose of paracetamol for a cold
appointment to remove a plaster cast next week
"""

URGENT: Final[tuple[str, ...]] = tuple(_URGENT.splitlines())
ROUTINE: Final[tuple[str, ...]] = tuple(_ROUTINE.splitlines())
